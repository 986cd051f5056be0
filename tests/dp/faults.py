"What tests that kill a process share; their drivers import it too"
import os, signal

class Patched:
    "A module with some functions replaced"
    def __init__(self, module, **new): self.__dict__.update(_module=module, **new)
    def __getattr__(self, k): return getattr(self._module, k)

def die(): os.kill(os.getpid(), signal.SIGKILL)

def at_call(n, real, last):
    "`real`, and at its n-th call `last` instead"
    left = [n]
    def f(*args):
        left[0] -= 1
        return real(*args) if left[0] else last(real, *args)
    return f
