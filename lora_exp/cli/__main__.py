"""Entry point of `python -m lora_exp.cli`."""

from lora_exp.cli import main

if __name__ == "__main__":
    main()
