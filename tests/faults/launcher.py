"""Forks a run for each line on standard input, so that the imports are paid for once and not before every kill.

A line is JSON: ``words`` of the command line, ``said``, the file that gets its standard output and error, and
``largest``, the limit of a file's size in bytes or null. The answers are two lines: the process id, and how it ended
(an exit code, or a signal as a negative number). The fork is a process of its own that does what ``rto`` does.

With words of a command line it does them itself and forks nothing.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys

import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import rto.pipeline
import rto.report.tables  # noqa: F401
from rto.cli import main

if sys.argv[1:]:
    sys.exit(main(sys.argv[1:]))
# A thread of before would be missing in the forks; with none there is nothing that a new process does not have.
if os.path.exists("/proc/self/task"):
    assert len(os.listdir("/proc/self/task")) == 1, "a library has started a thread: set OMP_NUM_THREADS=1"
gc.collect()
gc.freeze()  # what lives by now is never looked at again: at its end a fork would copy all of it
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, place in ((os.open(os.devnull, os.O_RDONLY), 0), (said, 1), (said, 2)):
            os.dup2(number, place)
        if order["largest"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"], order["largest"]))
        sys.exit(main(order["words"]))  # as cli.py ends
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
