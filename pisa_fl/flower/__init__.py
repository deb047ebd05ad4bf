"""`engine=flower`: Flower's app, its processes, and a real federation's hosts."""
