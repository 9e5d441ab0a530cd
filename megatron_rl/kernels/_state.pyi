"""Types of the compiled module; its sources are csrc/bindings/state*.cpp."""

built_with_torch: str

class BlockAllocator:
    def __init__(self, num_blocks: int) -> None: ...
    @property
    def num_blocks(self) -> int: ...
