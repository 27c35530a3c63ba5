"""Sets the environment variables that torch reads once. Import it before torch; values set by the user stay."""

import os
import sys

# OpenMP reads this when torch loads it. Threads that spin while they wait make a busy machine ten times
# slower (measured on two shared cores) and gain little on an idle machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# torch's allocator reads this at its first use. Images of six sizes leave gaps between the allocator's
# blocks: the gaps filled an 8 GB card of which tensors used 7.1. Expandable segments leave no gaps, but only
# Linux has them. PYTORCH_CUDA_ALLOC_CONF is the older name of the variable. If the user has set it, it stays
# in effect.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
