"""vLLM's scheduler with LoRA adapters, one step after another, in plain Python: what the twin must agree with.

Nothing here is fast or shared with the twin: lists are walked, tokens are counted, and every step is taken.
"""

import math
from dataclasses import dataclass, field


@dataclass
class Request:
    index: int
    arrival_s: float
    adapter: int
    prompt: int
    output: int
    computed: int = 0
    generated: int = 0
    blocks: int = 0
    decoding: bool = False
    place: int = 0
    first_token_s: float = math.nan
    finish_s: float = math.nan
    preempted_s: float = math.nan
    state: str = "never"

    @property
    def known_tokens(self) -> int:
        return self.prompt + self.generated


@dataclass
class Costs:
    """Seconds; the names are the profile's."""

    base: float = 0.01
    decode: float = 0.0
    prefill: float = 0.0
    context: float = 0.0
    decode_prefill: float = 0.0
    eager: float = 0.0
    graph_tokens: float = 1e9
    lora: float = 0.0
    adapter: float = 0.0
    lora_decode: float = 0.0
    lora_prefill: float = 0.0
    adapter_token: float = 0.0
    small: float = 0.0
    small_adapter: float = 0.0
    small_tokens: float = 0.0
    queue: float = 0.0
    running: float = 0.0
    skipped: float = 0.0
    request: float = 0.0
    first_request: float = 0.0
    label_set: float = 0.0
    scrape_period: float = 0.0
    merge_batch: float = 0.0


@dataclass
class Limits:
    max_seqs: int
    max_tokens: int
    block: int
    blocks: int
    slots: int
    cpu_adapters: int
    outstanding: int


@dataclass
class Twin:
    requests: list[Request]
    base_model: int
    load_s: list[float]
    disk_s: list[float]
    costs: Costs
    limits: Limits
    duration_s: float
    now: float = 0.0
    step: int = 0
    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    free: int = 0
    coming: int = 0
    taken: int = 0
    blocked: float = 0.0
    known: set[int] = field(default_factory=set)
    outstanding: int = 0
    turn: list[int] = field(default_factory=list)
    in_slot: list[int] = field(default_factory=list)
    in_host: list[int] = field(default_factory=list)
    labels: set[tuple[frozenset[int], frozenset[int]]] = field(default_factory=set)
    next_scrape: float = math.inf
    stall: tuple[float, float] = (0.0, -1.0)
    last_step: tuple[float, int] = (0.0, 0)
    merged: float = 0.0
    first_place: int = 0
    last_place: int = 0
    preemptions: int = 0
    loads: int = 0
    disk_loads: int = 0
    steps: int = 0
    most_adapters: int = 0
    running_s: float = 0.0
    history: list[tuple[float, float, int]] = field(default_factory=list)
    gaps: list[tuple[float, int]] = field(default_factory=list)

    def run(self) -> "Twin":
        self.free = self.limits.blocks
        if self.costs.scrape_period > 0:
            self.next_scrape = self.costs.scrape_period
        while True:
            self.take_arrivals()
            if self.now >= self.duration_s:
                break
            if not self.running and not self.waiting:
                self.now = self.upcoming()
            elif not self.one_step():
                break
        for request in self.requests[self.coming :]:
            if request.arrival_s < self.duration_s:
                if self.outstanding == self.limits.outstanding:
                    request.state = "rejected"
                else:
                    self.outstanding += 1
        return self

    def delivered(self, at: float) -> float:
        while self.next_scrape <= at:
            length = self.costs.label_set * len(self.labels)
            self.stall = (self.next_scrape, self.next_scrape + length)
            self.next_scrape = self.stall[1] + self.costs.scrape_period
            seconds, decodes = self.last_step
            if 0 < decodes <= self.costs.merge_batch and length > seconds:
                self.merged += decodes * (length / seconds - 1)
                self.gaps.append((length, decodes))
        return self.stall[1] if self.stall[0] <= at < self.stall[1] else at

    def take_arrivals(self) -> None:
        while self.coming < len(self.requests) and self.requests[self.coming].arrival_s <= self.now:
            request = self.requests[self.coming]
            if self.taken == self.coming:
                self.blocked = self.delivered(max(self.blocked, request.arrival_s))
                turn = [r for r in self.requests[self.coming :] if r is request or r.arrival_s <= self.blocked]
                firsts = {r.adapter for r in turn} - self.known - {self.base_model}
                self.known |= firsts
                self.taken += len(turn)
                self.blocked += len(firsts) * self.costs.first_request
            if self.blocked + self.costs.request > self.now:
                return
            if self.outstanding == self.limits.outstanding:
                request.state = "rejected"
            else:
                self.outstanding += 1
                request.state = "waiting"
                self.last_place += 1
                request.place = self.last_place
                self.waiting.append(request)
            self.coming += 1

    def upcoming(self) -> float:
        if self.coming == len(self.requests):
            return self.duration_s
        ready = self.blocked + self.costs.request
        return min(ready if self.taken > self.coming else self.requests[self.coming].arrival_s, self.duration_s)

    def adapters(self, requests: list[Request]) -> set[int]:
        return {r.adapter for r in requests if r.adapter != self.base_model}

    def allocate(self, request: Request, tokens: int) -> bool:
        need = math.ceil((request.computed + tokens) / self.limits.block) - request.blocks
        if need > self.free:
            return False
        self.free -= need
        request.blocks += need
        return True

    def release(self, request: Request) -> None:
        self.free += request.blocks
        request.blocks = 0

    def preempt(self) -> Request:
        victim = self.running.pop()
        self.release(victim)
        victim.computed = 0
        victim.decoding = False
        victim.state = "waiting"
        victim.preempted_s = self.now
        self.first_place -= 1
        victim.place = self.first_place
        self.waiting.insert(0, victim)
        self.preemptions += 1
        return victim

    def one_step(self) -> bool:
        budget = self.limits.max_tokens
        scheduled: dict[int, int] = {}
        preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            tokens = min(request.known_tokens - request.computed, budget)
            stopped = False
            while not self.allocate(request, tokens):
                preempted = True
                victim = self.preempt()
                scheduled.pop(victim.index, None)
                if victim is request:
                    stopped = True
                    break
            if stopped:
                break
            scheduled[request.index] = tokens
            budget -= tokens
            index += 1
        skipped = 0
        while not preempted and self.waiting and budget > 0 and len(self.running) < self.limits.max_seqs:
            present = self.adapters(self.running)
            full = len(present) == self.limits.slots
            able = [r for r in self.waiting if not full or r.adapter in present or r.adapter == self.base_model]
            if not able:
                skipped = len(self.waiting)
                break
            request = able[0]
            skipped = min(len(self.waiting), request.place - self.waiting[0].place)
            tokens = min(request.known_tokens, budget)
            if not self.allocate(request, tokens):
                break
            self.waiting.remove(request)
            self.running.append(request)
            request.state = "running"
            scheduled[request.index] = tokens
            budget -= tokens
        loading = self.load()
        present = self.adapters(self.running)
        self.most_adapters = max(self.most_adapters, len(present))
        assert len(present) <= self.limits.slots
        self.labels.add((frozenset(present), frozenset(r.adapter for r in self.waiting)))

        decoding = [r for r in self.running if r.decoding]
        decodes = len(decoding)
        prefill = sum(scheduled.values()) - decodes
        context = sum(r.computed for r in decoding)
        seconds = self.seconds(decodes, prefill, context, len(present), skipped) + loading
        until = min(self.now + seconds, self.duration_s)
        self.running_s += len(self.running) * (until - self.now)
        self.history.append((self.now, until, len(self.running) + len(self.waiting)))
        if decodes:
            self.gaps.append((seconds, decodes))
        self.last_step = (seconds, decodes)
        self.now += seconds
        self.steps += 1
        if self.now > self.duration_s:
            return False

        ended = []
        for request in list(self.running):
            request.computed += scheduled.get(request.index, 0)
            if request.index in scheduled and request.computed == request.known_tokens:
                ended.append(request)
        # Those that decode are told before those whose prefill ended, each in the order of the batch.
        for request in [r for r in ended if r in decoding] + [r for r in ended if r not in decoding]:
            request.generated += 1
            request.decoding = True
            if request.generated == 1:
                request.first_token_s = self.delivered(self.now)
            if request.generated == request.output:
                request.finish_s = self.delivered(self.now)
                request.state = "completed"
                self.running.remove(request)
                self.release(request)
                self.outstanding -= 1
        self.step += 1
        return True

    def load(self) -> float:
        """Touch the batch's adapters one after another, as vLLM's LRU caches are touched."""
        seconds = 0.0
        for adapter in sorted(self.adapters(self.running), key=self.turn.__getitem__):
            if adapter not in self.in_host:
                if len(self.in_host) == self.limits.cpu_adapters:
                    victim = self.in_host.pop(0)
                    if victim in self.in_slot:
                        self.in_slot.remove(victim)
                self.disk_loads += 1
                seconds += self.disk_s[adapter]
            else:
                self.in_host.remove(adapter)
            self.in_host.append(adapter)
            if adapter not in self.in_slot:
                if len(self.in_slot) == self.limits.slots:
                    self.in_slot.pop(0)
                self.loads += 1
                seconds += self.load_s[adapter]
            else:
                self.in_slot.remove(adapter)
            self.in_slot.append(adapter)
        return seconds

    def seconds(self, decodes: int, prefill: int, context: int, adapters: int, skipped: int) -> float:
        c = self.costs
        seconds = c.base + c.decode * decodes + c.prefill * prefill + c.context * context
        seconds += c.decode_prefill * decodes * prefill
        if decodes + prefill > c.graph_tokens:
            seconds += c.eager
        if adapters:
            seconds += c.lora + c.adapter * adapters + c.adapter_token * adapters * (decodes + prefill)
            seconds += c.lora_decode * decodes + c.lora_prefill * prefill
            if decodes + prefill < c.small_tokens:
                seconds += c.small + c.small_adapter * adapters
        return seconds + c.queue + c.running * decodes + c.skipped * skipped

    def late(self) -> tuple[float, float]:
        """Request-seconds of the second half, and their moment around its middle."""
        area = moment = 0.0
        for start, end, count in self.history:
            a, b = max(start, self.duration_s / 2), end
            if b > a:
                area += count * (b - a)
                moment += count * ((b * b - a * a) / 2 - (b - a) * 0.75 * self.duration_s)
        return area, moment
