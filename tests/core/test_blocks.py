from wanqwen.core.blocks import Run, run_blocks


class Recorder:
    def __init__(self, name: str, calls: list[str]):
        self.name, self.calls = name, calls

    def before(self, i: int) -> None:
        self.calls.append(f"{self.name} in {i}")

    def after(self, i: int) -> None:
        self.calls.append(f"{self.name} out {i}")


def test_hooks_surround_each_block_in_order() -> None:
    calls: list[str] = []
    run = Run(hooks=(Recorder("swap", calls), Recorder("unpack", calls)))

    def call(i: int, block: int, state: int) -> int:
        calls.append(f"block {i}")
        return state + block

    assert run_blocks([10, 20], 1, call, run=run) == 31
    around = ["swap in {}", "unpack in {}", "block {}", "unpack out {}", "swap out {}"]
    assert calls == [text.format(i) for i in (0, 1) for text in around]


def test_inject_changes_the_state_after_its_block() -> None:
    out = run_blocks(
        [1, 1, 1], (0, "text"), lambda i, block, s: (s[0] + block, s[1]), run=Run(),
        inject={1: lambda s: (s[0] * 10, s[1])},
    )  # fmt: skip
    assert out == (21, "text")
