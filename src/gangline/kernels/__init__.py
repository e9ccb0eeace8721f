"""``y = experts(x)`` on the bytes as they lie: a torch reference now, native kernels behind the same
protocol.
"""
