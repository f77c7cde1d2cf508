"""The benchmarks' processes and the tests' ranks come from one fork server, which imports what is asked for first.

Started here, before a benchmark asks: without the ranks' imports every rank of every test takes a second more.
"""

from multiprocessing import forkserver

import tools.ranks  # noqa: F401  what it asks for

forkserver.ensure_running()
