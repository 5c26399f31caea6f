"""`python run.py peft=lora quant=nf4`: one composed run; `-m peft.r=8,16,32`: a sweep of them."""

from lora_exp.__main__ import main

if __name__ == "__main__":
    main()
