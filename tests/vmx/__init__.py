"""A KVM host with VT-x made of software: Bochs emulates VMX with EPT, and a stock kernel in it loads kvm-intel.

``python -m tests.vmx`` (``make vmx``) runs a smoke test there: one processor of some 130 million instructions a second
is too slow for the suite. The disks are those of :mod:`tests.svm`.
"""
