"""What of its work a kernel does, so that its arithmetic and its copies can be timed apart."""

from typing import Literal

Stage = Literal["full", "comp", "dma"]
"""All of it; every multiplication, on tiles that stay where they are; or every copy and no more."""
