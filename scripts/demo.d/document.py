"""A long document, the same on every machine: the day book of a harbour depot that never was."""

from __future__ import annotations

import random

_TOWNS = ["Ostrava Quay", "Port Lindow", "Saltmarsh", "Karelia Basin", "Gannet Point", "Tolbrook", "Mirren Dock", "Veldhaven"]
_BARGES = ["Aurora", "Brandt", "Cormorant", "Dorothea", "Ebba", "Fortuna", "Grayling", "Halcyon", "Isolde", "Juniper"]
_GOODS = ["rye", "tin", "cedar planks", "lamp oil", "wool", "salted herring", "copper wire", "barley", "glass beads", "tallow"]
_UNITS = ["sacks", "crates", "barrels", "bundles", "pallets"]
_CLERKS = ["Maud", "Anselm", "Petra", "Jonas", "Idris", "Celia", "Tomas", "Wren"]
_WEATHER = ["fog until noon", "a hard frost", "rain from the west", "a clear sky", "wind that shook the cranes", "thin snow"]
_EVENTS = [
    "The scales were found two pounds heavy and were set right before the evening bell.",
    "A child asked whether the cranes sleep, and the foreman said that they do, but standing.",
    "Two ledgers disagreed by a single line, and the older one was right.",
    "The ice on the canal held a dog but not a man.",
    "Somebody had chalked a ship on the north door, and nobody wiped it away.",
    "The night watch counted the lamps twice and found one more than there should be.",
    "A letter came from the governor, asking again for the count of last winter.",
    "The bread was late, so the loading was late, so the tide was missed.",
]


def day_book(number: int, days: int) -> str:
    """Book `number`: its own title, people and cargoes from the first line on, so that no two books share a prefix."""
    rng = random.Random(7919 * (number + 1))
    town = _TOWNS[number % len(_TOWNS)]
    lines = [f"The Day Book of {town}, volume {number + 1}, kept by {rng.choice(_CLERKS)} and two apprentices.\n"]
    for day in range(1, days + 1):
        barge, goods, hall = rng.choice(_BARGES), rng.choice(_GOODS), rng.choice("ABCDEFGH")
        lines.append(
            f"Day {day}. {rng.choice(_WEATHER).capitalize()}. The barge {barge} brought {rng.randrange(20, 900)} "
            f"{rng.choice(_UNITS)} of {goods}, which {rng.choice(_CLERKS)} put into hall {hall}. {rng.choice(_EVENTS)} "
            f"At dusk {rng.choice(_CLERKS)} sold {rng.randrange(3, 40)} {rng.choice(_UNITS)} of {rng.choice(_GOODS)} "
            f"for {rng.randrange(10, 200)} crowns.\n"
        )
    return "\n".join(lines)


FIRST_QUESTION = "\n\nQuestion: Which barge came on day 2, and what did it bring?\nAnswer: On day 2 the barge"
SECOND_QUESTION = "\n\nQuestion: What was the weather on day 3?\nAnswer: On day 3 there was"
