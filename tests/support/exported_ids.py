"""Whether exported tokenizers give the ids that they must, under whichever `transformers` is installed.

    python tests/support/exported_ids.py OUT

OUT is what `tokenizer_kinds.py` wrote. Nothing but `transformers` (4.57 or later) is needed.
"""

import json
import sys
from pathlib import Path

import transformers


def main(folder: str) -> int:
    """Print a line for each exported tokenizer; 1 where one differs."""
    different = 0
    for expected in sorted(Path(folder).glob("*.json")):
        told = json.loads(expected.read_text())
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(expected.with_suffix("")))
        same = sum(a == b for a, b in zip(tokenizer(told["texts"])["input_ids"], told["ids"], strict=True))
        names = {name: getattr(tokenizer, f"{name}_token_id") for name in told["names"]}
        rest = names == told["names"] and tokenizer.chat_template == told["chat_template"]
        different += same < len(told["texts"]) or not rest
        print(f"{expected.stem}: {same} of {len(told['texts'])} texts; special tokens and template {rest}")
    print("transformers", transformers.__version__)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
