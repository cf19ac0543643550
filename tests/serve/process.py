"""A server in a process of its own, with an engine that needs no model: `python process.py FOLDER DRAIN_SECONDS`."""

import signal
import sys
from pathlib import Path

from talker import Talker, served_by, talkative_tokenizer

from jaxformers import serving
from jaxformers.serve.served import Limits, Settings

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, serving._leave_quietly)
    address = serving.Address(port=0)
    settings = Settings(limits=Limits(drain_seconds=float(sys.argv[2])))
    engine = Talker(pause=0.05, tokens_a_step=1)
    served = served_by(engine, tokenizer=talkative_tokenizer(Path(sys.argv[1])))
    serving.run(served, serving.Options(address=address, settings=settings), serving.listen(address))
