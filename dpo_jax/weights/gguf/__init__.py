"""llama.cpp's files: header, architecture, tensors and tokenizer, read and written."""
