"""A Linux to boot: a small kernel built from source, stock kernels fetched, and initramfs archives written."""
