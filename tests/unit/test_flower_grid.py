"""The fog's Grid against a played Flower and a played MQTT side."""

import threading
import time
from collections.abc import Callable

import pytest
from flwr.app import Error, Message, RecordDict

from fedfog.flower import grid as grid_module
from fedfog.flower.grid import FogGrid, RegionsError, train_message
from fedfog.flower.reply import pack, unpack
from flower import PlayedFlower, PlayedFog

A, B = 11, 12


@pytest.fixture
def flower() -> PlayedFlower:
    return PlayedFlower(A, B)


@pytest.fixture
def fog() -> PlayedFog:
    return PlayedFog()


@pytest.fixture
def grid(flower: PlayedFlower, fog: PlayedFog, monkeypatch: pytest.MonkeyPatch) -> FogGrid:
    """A grid that looks every 0.05 s for lost bells, with a grace of 0.3 s."""
    monkeypatch.setattr(grid_module, "LOOK_EVERY", 0.05)
    return FogGrid(flower, fog, grace=0.3)


def exchange(grid: FogGrid, minimum: int = 1, timeout: float = 5.0) -> list[str]:
    """One exchange with all regions; returns who answered."""
    grid.wait_for_regions(minimum, [], timeout)
    messages = [train_message(node, "run/1", timeout) for node in grid.get_node_ids()]
    return [unpack(reply)[0] for reply in grid.send_and_receive(messages, timeout=timeout)]


def answer(flower: PlayedFlower, fog: PlayedFog, regions: dict[int, str]) -> None:
    """Have the nodes of `regions` answer at once, and ring."""

    def on_push(message: Message) -> None:
        if region := regions.get(message.metadata.dst_node_id):
            flower.reply(message, pack(region, b"partial"))
            fog.bell(region, message)

    flower.on_push = on_push


def later(action: Callable[[], None], seconds: float = 0.1) -> None:
    threading.Timer(seconds, action).start()


class TestExchange:
    def test_each_reply_is_pulled_once_when_its_bell_rings(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A)
        fog.bridge("b", B)
        answer(flower, fog, {A: "a", B: "b"})
        assert exchange(grid, minimum=2) == ["a", "b"]
        assert len(flower.pulls) == 2
        assert grid.left_out == {}
        assert set(grid.seconds) == {"push", "reply", "pull"}

    def test_cue_is_sent_after_all_messages_are_pushed(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A)
        fog.bridge("b", B)
        answer(flower, fog, {A: "a", B: "b"})
        cues_at_push: list[int] = []
        reply = flower.on_push

        def on_push(message: Message) -> None:
            cues_at_push.append(len(fog.cues))
            reply(message)

        flower.on_push = on_push
        exchange(grid, minimum=2)
        assert cues_at_push == [0, 0]
        assert fog.cues == [("run", 1)]

    def test_reply_without_a_bell_is_found_by_looking(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A)
        flower.on_push = lambda message: flower.reply(message, pack("a", b"partial"))
        assert exchange(grid) == ["a"]

    def test_bell_of_an_unknown_message_is_ignored(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A)
        stranger = train_message(A, "run/1", 1.0)
        stranger.metadata.__dict__["_message_id"] = "of-another-run"
        fog.bell("a", stranger)
        answer(flower, fog, {A: "a"})
        assert exchange(grid) == ["a"]
        assert "of-another-run" not in flower.pulls

    @pytest.mark.parametrize(
        ("node_id", "boot", "session"), [(B, 2, 1), (A, 2, 1), (B, 1, 1), (A, 1, 2)]
    )
    def test_bridge_with_a_new_boot_node_or_session_gets_the_message_again(
        self,
        grid: FogGrid,
        flower: PlayedFlower,
        fog: PlayedFog,
        node_id: int,
        boot: int,
        session: int,
    ) -> None:
        fog.bridge("a", A)

        def restart() -> None:
            answer(flower, fog, {node_id: "a"})
            fog.bridge("a", None, online=False)
            fog.bridge("a", node_id, boot, session)

        flower.on_push = lambda _message: later(restart)
        assert exchange(grid) == ["a"]
        assert [m.metadata.dst_node_id for m in flower.pushed] == [A, node_id]
        assert {m.metadata.group_id for m in flower.pushed} == {"run/1"}
        assert len(fog.cues) == 2

    def test_bridge_that_only_lost_its_mqtt_connection_does_not(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A)

        def reconnect() -> None:
            fog.bridge("a", None, online=False)
            fog.bridge("a", A)
            flower.reply(flower.pushed[0], pack("a", b"partial"))
            fog.bell("a", flower.pushed[0])

        flower.on_push = lambda _message: later(reconnect)
        assert exchange(grid) == ["a"]
        assert len(flower.pushed) == 1

    def test_message_that_flower_lost_is_pushed_again(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A)

        def on_push(message: Message) -> None:
            unavailable = Error(code=5, reason="node unavailable")
            first = len(flower.pushed) == 1
            flower.reply(message, unavailable if first else pack("a", b"partial"))

        flower.on_push = on_push
        assert exchange(grid) == ["a"]
        assert len(flower.pushed) == 2

    def test_announced_node_that_the_superlink_does_not_know_is_waited_for(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        fog.bridge("a", 99)
        answer(flower, fog, {A: "a"})
        later(lambda: fog.bridge("a", A))
        assert exchange(grid) == ["a"]

    def test_bridge_offline_longer_than_the_grace_is_left_out(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A)
        fog.bridge("b", B)
        answer(flower, fog, {A: "a"})
        later(lambda: fog.bridge("b", None, online=False))
        start = time.monotonic()
        assert exchange(grid, minimum=2, timeout=30.0) == ["a"]
        assert time.monotonic() - start < 15
        assert "BRIDGE_GRACE" in grid.left_out["b"]

    def test_region_without_a_partial_at_the_deadline_is_left_out(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A)
        fog.bridge("b", B)
        answer(flower, fog, {A: "a"})
        assert exchange(grid, minimum=2, timeout=0.3) == ["a"]
        assert "ROUND_TIMEOUT" in grid.left_out["b"]

    def test_late_will_of_an_earlier_boot_does_not_count(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A, boot=2)
        fog.bridge("a", None, boot=1, online=False)
        answer(flower, fog, {A: "a"})
        assert exchange(grid) == ["a"]

    def test_reply_in_the_name_of_another_region_is_refused(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A)
        fog.bridge("b", B)
        answer(flower, fog, {A: "b", B: "b"})
        assert exchange(grid, minimum=2) == ["b"]
        assert "region b" in grid.left_out["a"]

    def test_reply_that_is_not_of_fedfog_is_refused(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A)
        flower.on_push = lambda message: flower.reply(message, RecordDict())
        assert exchange(grid) == []
        assert "no region" in grid.left_out["a"]

    def test_looking_that_takes_long_does_not_hold_up_the_deadline(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Flower waits up to 180 s for a reply whose sender died while it was uploading."""
        fog.bridge("a", A)
        stuck = threading.Event()
        monkeypatch.setattr(flower, "pull_messages", lambda _ids: stuck.wait(20) and [])
        start = time.monotonic()
        assert exchange(grid, timeout=0.4) == []
        assert time.monotonic() - start < 15
        stuck.set()

    def test_failure_of_looking_ends_the_exchange(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fog.bridge("a", A)

        def fail(_ids: object) -> list[Message]:
            raise ConnectionError("the SuperLink is gone")

        monkeypatch.setattr(flower, "pull_messages", fail)
        with pytest.raises(ConnectionError, match="gone"):
            exchange(grid)


class TestStockSuperNodes:
    def test_every_node_that_nobody_announces_is_asked(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        """A ghost of a killed SuperNode among them does no harm."""
        flower.nodes.add(13)
        fog.bridge("a", A)
        fog.bridge("b", None)

        def on_push(message: Message) -> None:
            regions = {A: "a", 13: "b"}
            if region := regions.get(message.metadata.dst_node_id):
                flower.reply(message, pack(region, b"partial"))

        flower.on_push = on_push
        assert exchange(grid, minimum=2) == ["a", "b"]
        assert sorted(m.metadata.dst_node_id for m in flower.pushed) == [A, B, 13]

    def test_node_that_comes_during_the_round_is_asked(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        flower.nodes = {A}
        fog.bridge("b", None)

        def restart() -> None:
            flower.on_push = lambda message: flower.reply(message, pack("b", b"partial"))
            flower.nodes = {B}

        flower.on_push = lambda _message: later(restart)
        assert exchange(grid) == ["b"]
        assert [m.metadata.dst_node_id for m in flower.pushed] == [A, B]

    @pytest.mark.parametrize("boot", [1, 2], ids=["supernode", "bridge"])
    def test_node_that_is_started_again_between_two_looks_is_asked_again(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog, boot: int
    ) -> None:
        """With a key it is the same node, and the SuperLink does not say that it was away."""
        flower.nodes = {A}
        fog.bridge("a", None)

        def restart() -> None:
            flower.on_push = lambda message: flower.reply(message, pack("a", b"partial"))
            fog.bridge("a", None, online=False)
            fog.bridge("a", None, boot)

        flower.on_push = lambda _message: later(restart)
        assert exchange(grid) == ["a"]
        assert [m.metadata.dst_node_id for m in flower.pushed] == [A, A]

    def test_round_does_not_wait_for_apps_that_have_all_failed(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        flower.nodes = {A}
        fog.bridge("a", None)
        failed = Error(code=2, reason="no partial of round 1")
        flower.on_push = lambda message: flower.reply(message, failed)
        assert exchange(grid) == []
        assert "no partial of round 1" in grid.left_out["a"]

    def test_regions_are_not_there_before_their_nodes(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        flower.nodes.clear()
        fog.bridge("a", None)
        with pytest.raises(RegionsError):
            grid.wait_for_regions(1, [], timeout=0.2)


class TestWaitForRegions:
    def test_returns_when_enough_are_online(self, grid: FogGrid, fog: PlayedFog) -> None:
        later(lambda: fog.bridge("b", B))
        fog.bridge("a", A)
        assert grid.wait_for_regions(2, [], timeout=10.0) == ["a", "b"]

    def test_too_few_end_in_an_error_that_names_settings_and_regions(
        self, grid: FogGrid, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A)
        with pytest.raises(RegionsError) as error:
            grid.wait_for_regions(2, ["a", "b"], timeout=0.2)
        for part in ("MIN_AVAILABLE_CLIENTS", "REGIONS_TIMEOUT", "online: a", "missing: b"):
            assert part in str(error.value)

    def test_region_that_never_came_is_waited_for_once(self, grid: FogGrid, fog: PlayedFog) -> None:
        fog.bridge("a", A)
        start = time.monotonic()
        assert grid.wait_for_regions(1, ["a", "b"], timeout=0.3) == ["a"]
        assert time.monotonic() - start >= 0.3
        start = time.monotonic()
        assert grid.wait_for_regions(1, ["a", "b"], timeout=30.0) == ["a"]
        assert time.monotonic() - start < 15

    def test_region_that_never_came_is_recorded_as_left_out(
        self, grid: FogGrid, flower: PlayedFlower, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A)
        answer(flower, fog, {A: "a"})
        grid.wait_for_regions(1, ["a", "b"], timeout=0.1)
        grid.send_and_receive([train_message(A, "run/1", 5.0)], timeout=5.0)
        assert list(grid.left_out) == ["b"]

    def test_region_that_was_there_is_waited_for_during_its_grace(
        self, grid: FogGrid, fog: PlayedFog
    ) -> None:
        fog.bridge("a", A)
        fog.bridge("b", B)
        grid.wait_for_regions(2, [], timeout=5.0)
        grid.bridges.grace = 5.0
        fog.bridge("b", None, online=False)
        later(lambda: fog.bridge("b", B, boot=2))
        assert grid.wait_for_regions(1, [], timeout=5.0) == ["a", "b"]

    def test_region_gone_longer_than_its_grace_is_not(self, grid: FogGrid, fog: PlayedFog) -> None:
        fog.bridge("a", A)
        fog.bridge("b", B)
        grid.wait_for_regions(2, [], timeout=5.0)
        fog.bridge("b", None, online=False)
        start = time.monotonic()
        assert grid.wait_for_regions(1, ["a", "b"], timeout=30.0) == ["a"]
        assert time.monotonic() - start < 15
