"""How long requests wait where only chance makes them wait: the M/D/1 queue, exactly.

Poisson arrivals, one server, the same service time for all: what an undisturbed server shows under
the load `server`. What is measured beyond it comes from the machine, not from the queue.
"""

from __future__ import annotations

import math

import numpy as np

from rtresnet.core.errors import InputError


def queue_lengths(load: float, count: int) -> np.ndarray:
    """Stationary probabilities of 0, 1, ... `count` - 1 requests in the system.

    By balancing what crosses each level upwards and downwards, so that every term is positive and
    no digit is lost, whatever the load.
    """
    arrivals = _poisson(load, count + 60)  # in one service; what is cut off is below 1e-60
    beyond = np.cumsum(arrivals[::-1])[::-1][1:]  # more than k of them
    found = np.zeros(count)
    found[0] = 1 - load
    for level in range(count - 1):
        up = found[0] * beyond[level] + found[1 : level + 1] @ beyond[level:0:-1]
        found[level + 1] = up / arrivals[0]
    return found


def _poisson(mean: float, count: int) -> np.ndarray:
    """Probabilities of 0, 1, ... `count` - 1 events."""
    terms = [math.exp(-mean)]
    for number in range(1, count):
        terms.append(terms[-1] * mean / number)
    return np.asarray(terms)


def waiting_below(time: float, *, load: float, lengths: np.ndarray) -> float:
    """P(wait <= `time`), with time in units of the service time.

    Franx's form of Erlang's and Crommelin's result, a sum of positive terms (Operations Research
    Letters 29, 2001).

    Args:
        time: From 0.
        load: Arrival rate times service time, below 1.
        lengths: Of `queue_lengths`, more than `time` + 2 of them.
    """
    steps = int(time) + 1
    waiting = np.cumsum(lengths)[1 : steps + 1]  # P(at most j waiting), the one served left out
    return float(waiting[::-1] @ _poisson(load * (steps - time), steps))


def latency_quantile(share: float, *, rate: float, service: float) -> float:
    """The latency, waiting and service, that a share of the requests does not exceed.

    Args:
        share: As 0.99.
        rate: Requests a second.
        service: Seconds.

    Returns:
        Seconds.

    Raises:
        InputError: The load is 1 or more: the queue grows without end.
    """
    load = rate * service
    if load >= 1:
        raise InputError(f"{rate:g} requests/s of {service:g} s each: more than one server can do")
    low, high, size = 0.0, 1.0, 64
    lengths = queue_lengths(load, size)
    while waiting_below(high, load=load, lengths=lengths) < share:
        high *= 2
        if high + 3 > size:
            size *= 4
            lengths = queue_lengths(load, size)
    for _ in range(60):
        middle = (low + high) / 2
        if waiting_below(middle, load=load, lengths=lengths) < share:
            low = middle
        else:
            high = middle
    return service * (1 + (0.0 if share <= 1 - load else high))
