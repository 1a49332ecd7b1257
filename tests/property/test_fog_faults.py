"""Model checking of the whole way up: clients, aggregator, bridge, SuperLink and central server, of
which each crashes at any step. A global model is made of the partial of its round, once."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from faulty_region import RUN, FaultyRegion
from fedfog.core.bridge import Decision, Matcher

MessageId = int


class FaultyFog(FaultyRegion):
    """A region, its bridge, and a server that checkpoints each model before it publishes it."""

    def _begin_above(self) -> None:
        self.model = 0
        self.retained: tuple[int, bytes] | None = None  # at the broker
        self.to_bridge: list[tuple[int, bytes]] = []
        self.checkpoints: dict[int, bytes] = {}  # the server's disk
        self.last_id = 0
        self.outstanding: MessageId | None = None
        self.matcher: Matcher[tuple[MessageId, int]] = Matcher()
        self._start_superlink()
        self._start_bridge()

    # The world around the rules

    def _partial_published(self, round: int) -> None:
        self.retained = (round, self.store.partials[round][0].tobytes())
        self.to_bridge.append(self.retained)

    def _start_superlink(self) -> None:
        """Its state is in memory, and the ServerApp dies with it."""
        self.inbox: list[tuple[MessageId, int]] = []
        self.replies: dict[MessageId, tuple[int, bytes]] = {}
        self._start_server()

    def _start_bridge(self) -> None:
        """A new node: what was pushed to the old one is lost."""
        self.matcher = Matcher()
        self.inbox = []
        self.outstanding = None
        self.to_bridge = [self.retained] if self.retained else []

    def _start_server(self) -> None:
        """It goes on from its newest checkpoint, which it publishes again."""
        self.outstanding = None
        self.matcher.forget_messages()
        newest = max(self.checkpoints, default=0)
        if newest > self.model:
            self._publish_model(newest)

    def _carry_out(self, decision: Decision[tuple[MessageId, int]]) -> None:
        if decision.reply is not None:
            (message_id, round), payload = decision.reply
            assert message_id not in self.replies, "a train message was answered twice"
            self.replies[message_id] = (round, payload)

    # What may happen

    @rule(die=st.sampled_from(["no", "no", "before checkpoint", "before publish"]))
    def publish_next_model(self, die: str = "no") -> None:
        """The server pushes its train message, or takes the reply to it."""
        if self.outstanding is None:
            self.last_id += 1
            self.outstanding = self.last_id
            self.inbox.append((self.last_id, self.model + 1))
        elif self.outstanding in self.replies:
            round, payload = self.replies.pop(self.outstanding)
            assert round == self.model + 1
            if die == "before checkpoint":
                return self._start_superlink()
            assert round not in self.checkpoints, "a round was aggregated twice"
            self.checkpoints[round] = payload
            if die == "before publish":
                return self._start_superlink()
            self.outstanding = None
            self._publish_model(round)
        return None

    @rule(die=st.sampled_from(["no", "no", "before reply", "after reply"]))
    def bridge_looks(self, die: str = "no") -> None:
        if not self.inbox:
            return
        message = self.inbox.pop(0)
        decision = self.matcher.on_message((RUN, message[1]), message)
        if die != "before reply":
            self._carry_out(decision)
        if die != "no":
            self._start_bridge()

    @rule(data=st.data(), copies=st.sampled_from([1, 1, 2]))
    def deliver_to_bridge(self, data: st.DataObject, copies: int) -> None:
        if self.to_bridge:
            index = data.draw(st.integers(0, len(self.to_bridge) - 1))
            round, payload = self.to_bridge.pop(index)
            for _ in range(copies):
                self._carry_out(self.matcher.on_partial((RUN, round), payload))

    @rule()
    def go_on_above(self) -> None:
        """Server and bridge do all they can."""
        self.publish_next_model()
        self.bridge_looks()
        while self.to_bridge:
            round, payload = self.to_bridge.pop(0)
            self._carry_out(self.matcher.on_partial((RUN, round), payload))
        self.publish_next_model()

    @rule(seconds=st.integers(1, 4))
    def be_calm(self, seconds: int) -> None:
        """Without it hardly a round would come to its end between the faults."""
        for _ in range(seconds):
            self._calm_second()

    @rule(
        fault=st.sampled_from(["superlink", "bridge", "server", "old partial", "broker forgets"]),
    )
    def suffer_above(self, fault: str) -> None:
        match fault:
            case "superlink":
                self._start_superlink()
            case "bridge":
                self._start_bridge()
            case "server":
                self._start_server()
            case "old partial":  # a broker that was restored from an old state
                if self.model in self.store.partials:
                    self.to_bridge.append(
                        (self.model, self.store.partials[self.model][0].tobytes())
                    )
            case "broker forgets":
                self.retained, self.to_bridge = None, []
                self.suffer("broker", "a")

    # The promises

    @invariant()
    def models_are_the_partials_of_their_rounds(self) -> None:
        for round, payload in self.checkpoints.items():
            assert payload == self.store.partials[round][0].tobytes()
        assert self.model <= len(self.checkpoints)

    def _reached(self, target: int) -> bool:
        return target + 1 in self.checkpoints

    def _calm_second(self) -> None:
        super()._calm_second()
        self.go_on_above()


FaultyFog.TestCase.settings = settings(max_examples=150, stateful_step_count=80, deadline=None)
TestFaultyFog = FaultyFog.TestCase
