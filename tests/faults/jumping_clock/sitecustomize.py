"""On the module path of a process: its wall clock jumps by up to a day, back and forth, at every reading."""

import random
import time

_chance = random.Random(7)
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _chance.uniform(-86400, 86400)
time.time_ns = lambda: _time_ns() + _chance.randrange(-86400, 86400) * 10**9
