"""An ordinary KVM host made of software: QEMU's TCG emulates AMD SVM, and a stock Debian kernel in it loads kvm-amd.

``python -m tests.svm`` (``make svm``) builds it from Debian packages by name, boots it, runs tests in it and exits with
their status. It needs neither ``/dev/kvm`` nor privilege. Figures measured in it are no speeds.
"""
