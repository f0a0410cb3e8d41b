"""Run scripts in forks of this process, which loads TensorFlow only once.

Loading TensorFlow takes a third of the time of a short run. Apart from that, a fork behaves like a script that is
started by hand. A fork would lose threads of TensorFlow, but none is running yet. Each line of the input is a request
in JSON with a script, its arguments, a file for its output, and environment variables to set. The server answers with
the ID of the process, and with its exit code after it exits.
"""

import json
import os
import runpy
import sys

import tensorflow  # noqa: F401

while request := sys.stdin.readline():
    child = os.fork()
    if not child:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

script, arguments, output, variables = json.loads(request)
os.environ.update(variables)
for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY)):
    os.dup2(os.open(path, flags), descriptor)
os.dup2(1, 2)
sys.argv[:] = script, *arguments
sys.path[0] = os.path.dirname(script)
runpy.run_path(script, run_name="__main__")
