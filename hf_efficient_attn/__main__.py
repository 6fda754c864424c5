"""`python -m hf_efficient_attn`: the command `hf-efficient-attn`."""

from .cli import main


if __name__ == "__main__":
    main()
