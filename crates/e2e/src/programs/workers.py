"""Threads that hash, threads that talk to subprocesses through pipes, a queue between them.

python3 workers.py RESULT: prints "ready", then answers requests in RESULT.go as limosa-target does.
"""

import hashlib
import os
import queue
import subprocess
import sys
import threading
import time

RESULT = sys.argv[1]
HASHING = 3
TALKING = 3


class Worker(threading.Thread):
    """A thread that counts its rounds and keeps its first failure."""

    def __init__(self, number):
        super().__init__(daemon=True)
        self.number = number
        self.rounds = 0
        self.failure = None

    def run(self):
        try:
            self.prepare()
            while True:
                self.work()
                self.rounds += 1
                time.sleep(0.003)
        except Exception as error:  # told by the next check
            self.failure = f"{type(self).__name__} {self.number}: {error!r}"

    def prepare(self):
        pass


class Hashing(Worker):
    """Hashes a chain; every link must follow from the first."""

    def prepare(self):
        self.chain = hashlib.sha256(bytes([self.number])).digest()
        self.first = self.chain

    def work(self):
        self.chain = hashlib.sha256(self.chain).digest()
        results.put((self.number, self.rounds + 1, self.chain))


class Talking(Worker):
    """Sends lines to a subprocess and wants them back, changed."""

    def prepare(self):
        self.process = subprocess.Popen(
            ["sed", "-u", "s/ping/pong/"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def work(self):
        self.process.stdin.write(f"ping {self.rounds}\n")
        answer = self.process.stdout.readline()
        if answer != f"pong {self.rounds}\n":
            raise ValueError(f"got {answer!r} in round {self.rounds}")


class Checking(Worker):
    """Computes the chains again from the queue."""

    def prepare(self):
        self.chains = {n: (0, hashlib.sha256(bytes([n])).digest()) for n in range(HASHING)}

    def work(self):
        # As many as the hashing threads make: if the queue were always full, one that waits for room in it could starve
        # for a third of a second, with or without a restore, while the others overtake it.
        for _ in range(HASHING):
            self.follow(*results.get())

    def follow(self, number, round_, link):
        before, chain = self.chains[number]
        chain = hashlib.sha256(chain).digest()
        if (round_, link) != (before + 1, chain):
            raise ValueError(f"chain {number} broke at link {round_} after {before}")
        self.chains[number] = (round_, chain)


results = queue.Queue(maxsize=8)
workers = [Hashing(n) for n in range(HASHING)] + [Talking(n) for n in range(TALKING)] + [Checking(0)]


def check():
    before = [worker.rounds for worker in workers]
    # A round takes milliseconds; the rest is for a busy machine.
    for _ in range(10):
        time.sleep(0.1)
        if all(worker.failure or worker.rounds > rounds for worker, rounds in zip(workers, before)):
            break
    for worker, rounds in zip(workers, before):
        if worker.failure:
            return f"FAIL: {worker.failure}"
        if worker.rounds <= rounds:
            return f"FAIL: {type(worker).__name__} {worker.number} stands still at {rounds}"
    return f"ok rounds={sum(worker.rounds for worker in workers)}"


def replace(path, text):
    with open(path + ".tmp", "w") as file:
        file.write(text + "\n")
    os.rename(path + ".tmp", path)


for worker in workers:
    worker.start()
time.sleep(0.1)
print("ready", flush=True)
while True:
    try:
        with open(RESULT + ".go") as file:
            request = file.read().strip()
        os.remove(RESULT + ".go")
    except FileNotFoundError:
        time.sleep(0.005)
        continue
    answer = check()
    replace(RESULT, answer)
    if request == "quit":
        sys.exit(not answer.startswith("ok"))
