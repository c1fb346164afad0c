"""Who goes to the replicas next: no owner fills what they take, and those that go away leave nothing behind."""

from __future__ import annotations

import asyncio

from deltakeeper.service.cluster.departures import Departures


def test_one_that_floods_leaves_room_for_others_and_gets_it_back():
    async def play():
        departures, gone, ends = Departures(lambda: 8), [], {}

        async def go(name, owner):
            async with departures.away(owner):
                gone.append(name)
                await ends.setdefault(name, asyncio.Event()).wait()

        tasks = {f"flood{at}": asyncio.create_task(go(f"flood{at}", "flood")) for at in range(10)}
        await asyncio.sleep(0)
        assert gone == [f"flood{at}" for at in range(4)]  # half of what the replicas take
        for at in range(2):
            tasks[f"quiet{at}"] = asyncio.create_task(go(f"quiet{at}", "quiet"))
        await asyncio.sleep(0)
        assert gone[4:] == ["quiet0", "quiet1"]
        for name in ("flood5", "flood0", "flood1"):
            tasks[name].cancel()  # one that waits and two that are under way
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert gone[6:] == ["flood4"]
        for _ in range(20):
            for name in gone:
                ends[name].set()
            await asyncio.sleep(0)
        assert gone[7:] == ["flood6", "flood7", "flood8", "flood9"]
        assert all(task.done() for task in tasks.values())
        assert not departures._lines and not departures._away

    asyncio.run(play())
