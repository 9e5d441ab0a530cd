"""`python -m megatron_rl`, the form torchrun needs; the same as the command `megatron-rl`."""

from megatron_rl.cli import main

if __name__ == "__main__":  # worker processes import this module again and must start nothing
    main()
