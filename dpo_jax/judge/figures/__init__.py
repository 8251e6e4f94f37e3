"""What verdicts and scores come to: numpy in, plain numbers out."""
