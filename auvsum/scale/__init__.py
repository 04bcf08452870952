"""Documents over several workers: a process a device (`processes.py`), or Ray actors on a cluster (`cluster.py`).

`pool.py` deals out documents and takes results back in order, `worker.py` is what runs at the other end, `placement.py`
turns flags into one or the other. Nothing here imports torch or Ray before it is needed.
"""
