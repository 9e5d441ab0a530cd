"""Importing the compiled module registers torch.ops.megatron_rl; its sources are csrc/bindings/ops*.cpp."""
