"""One `Llama` in the hands of several threads, and in the child of a fork. On a tiny dense model, in processes of their own:
what goes wrong there is no exception."""

import subprocess
import sys
import textwrap

import fuzz_gguf
import other_models
import pytest

BEGIN = """
import faulthandler, itertools, os, sys, threading
from allocmoe_edge import GenerationError, Llama

faulthandler.enable()
N = 12

def load(**options):
    return Llama(sys.argv[1], n_ctx=256, n_threads=2, n_threads_batch=2, verbose=False, **options)

def tokens(llm, prompt, n=N):
    return list(itertools.islice(llm.generate(llm.tokenize(prompt), temp=0.0), n))

def text(llm, prompt):
    return llm(prompt, max_tokens=N, temperature=0.0)["choices"][0]["text"]

def at_once(*works):
    failed = []
    def run(work):
        try:
            work()
        except BaseException as error:
            failed.append(error)
            raise
    threads = [threading.Thread(target=run, args=[work]) for work in works]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not failed, failed

def child(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0

llm = load()
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return other_models.write_dense(tmp_path_factory.mktemp("dense") / "dense.gguf")


def run(path, code: str) -> str:
    """What a program prints, which goes on after `BEGIN`; it must end, and well."""
    command = [sys.executable, "-c", BEGIN + textwrap.dedent(code), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- threads


def test_completions_of_several_threads_are_those_of_one(path):
    """Each waits for the one before it."""
    run(path, """
        prompts = ["Once upon a time", "abc", "xyz and more of it", "0"]
        expected = {prompt: text(llm, prompt) for prompt in prompts}
        def work(prompt):
            for _ in range(6):
                assert text(llm, prompt) == expected[prompt]
        at_once(*(lambda prompt=prompt: work(prompt) for prompt in prompts))
    """)  # fmt: skip


def test_any_call_beside_a_completion(path):
    run(path, """
        import time
        expected, state, done = text(llm, "abc"), llm.save_state(), []
        def completions():
            for _ in range(25):
                assert text(llm, "abc") == expected
            done.append(True)
        def others(*calls):
            while not done:
                for call in calls:
                    call()
                time.sleep(0.001)
        at_once(
            completions,
            lambda: others(llm.save_state, llm.expert_stats, lambda: llm.plan, llm.reset),
            lambda: others(lambda: llm.load_state(state), lambda: llm.eval([1, 2, 3]), llm.clear_cache),
            lambda: others(lambda: llm.detokenize(llm.tokenize(b"some text"))),
        )
    """)  # fmt: skip


def test_streams_of_two_threads(path):
    """The newest goes on, and the other one is told: its text is not mixed."""
    out = run(path, """
        expected, ended = tokens(llm, b"abc", 40), []
        def work():
            for _ in range(20):
                read = []
                try:
                    for token in itertools.islice(llm.generate(llm.tokenize(b"abc"), temp=0.0), 40):
                        read.append(token)
                except GenerationError:
                    ended.append(True)
                assert read == expected[: len(read)]
        at_once(work, work)
        print(len(ended))
    """)  # fmt: skip
    assert int(out) > 0


def test_a_stream_may_be_read_by_several_threads_in_turn(path):
    """As a server's pool of threads reads it."""
    run(path, """
        expected = tokens(llm, b"abc")
        stream, read = llm.generate(llm.tokenize(b"abc"), temp=0.0), []
        for _ in range(N):
            at_once(lambda: read.append(next(stream)))
        assert read == expected
    """)  # fmt: skip


def test_tokens_are_counted_while_another_thread_generates(path):
    """Nobody who only needs the vocabulary waits for a completion to end."""
    run(path, """
        counted = threading.Event()
        def criterion(ids, logits):
            assert counted.wait(30)  # this thread is in the midst of a step
            return True
        stream = llm.generate(llm.tokenize(b"abc"), stopping_criteria=criterion)
        def count():
            assert llm.detokenize(llm.tokenizer().encode("abc")) == b"abc"
            counted.set()
        at_once(lambda: list(stream), count)
    """)  # fmt: skip


def test_close_waits_for_the_thread_that_is_at_work(path):
    run(path, """
        begun, read, expected = threading.Event(), [], text(llm, "abc")
        def criterion(ids, logits):
            begun.set()
            return False
        def complete():
            read.append(llm("abc", max_tokens=N, temperature=0.0, stopping_criteria=criterion))
        def close():
            begun.wait()
            llm.close()
        at_once(complete, close)
        assert read[0]["choices"][0]["text"] == expected
        try:
            llm("abc")
        except RuntimeError as error:
            assert "closed" in str(error)
        else:
            raise AssertionError
    """)  # fmt: skip


def test_models_that_are_loaded_by_several_threads_leave_stdout_where_it_was(path):
    out = run(path, """
        for _ in range(10):
            at_once(*[load] * 4)
        os.write(1, b"still here")
    """)  # fmt: skip
    assert out == "still here"


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A model with experts, and the plan of every budget."""
    return fuzz_gguf.write_bases(tmp_path_factory.mktemp("bases"))[0]


def test_two_models_with_different_plans(planned):
    run(planned, """
        other = load()
        llm.set_budget(0.4), other.set_budget(1.0)
        expected = text(llm, "abc"), text(other, "abc")
        assert expected[0] != expected[1]
        def work(model, plan, wanted):
            for _ in range(8):
                assert text(model, "abc") == wanted and model.plan == plan
        at_once(lambda: work(llm, llm.plan, expected[0]), lambda: work(other, other.plan, expected[1]))
    """)  # fmt: skip


def test_two_contexts_of_one_model(planned):
    """Each at its own budget, by its own thread, at the same time."""
    run(planned, """
        import numpy as np
        llm.set_budget(1.0)
        second = llm.second_context(0.4)
        def steps(context):
            return np.concatenate([context.decode([token], n).copy() for n, token in enumerate(range(10, 30))])
        alone = steps(llm), steps(second)
        assert not np.allclose(*alone)
        def work(context, wanted):
            for _ in range(4):
                assert np.array_equal(steps(context), wanted)
        at_once(lambda: work(llm, alone[0]), lambda: work(second, alone[1]))
        second.close()
        assert np.array_equal(steps(llm), alone[0])
    """)  # fmt: skip


def test_budget_that_another_thread_changes_while_a_stream_runs(planned):
    """Between two tokens; what comes afterwards is of the budget that was set last."""
    run(planned, """
        llm.set_budget(0.4)
        expected, done = text(llm, "abc"), []
        llm.expert_stats(reset=True)
        def read():
            for _ in range(4):
                assert len(tokens(llm, b"abc", 60)) == 60
            done.append(True)
        def change():
            while not done:
                for budget in (1.0, 0.4, 0.75):
                    assert llm.set_budget(budget).budget_total == {1.0: 16, 0.4: 6, 0.75: 12}[budget]
        at_once(read, change)
        mean = llm.expert_stats()["decode"]["mean"].sum()
        assert 4 < mean < 16, mean
        llm.set_budget(0.4)
        assert text(llm, "abc") == expected
    """)  # fmt: skip


# --- forks

pytestmark = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")


@pytest.mark.parametrize("model", ["llm", "load()"], ids=["the parent's", "its own"])
def test_child_of_a_fork_computes(path, model):
    """GCC's OpenMP waits forever for threads that the child has not."""
    run(path, f"""
        expected = tokens(llm, b"abc")
        def work():
            assert tokens({model}, b"abc") == expected
        child(work)
        assert tokens(llm, b"abc") == expected
        child(lambda: child(work))
    """)  # fmt: skip


def test_child_of_a_fork_in_the_midst_of_a_call(path):
    """What another thread was doing is lost there, and said so; the thread that forks goes on."""
    out = run(path, """
        inside, go_on = threading.Event(), threading.Event()
        def criterion(ids, logits):
            inside.set()
            return go_on.wait(60)
        def use():
            for call in (lambda: text(llm, "abc"), lambda: llm.tokenize(b"x"), llm.save_state, lambda: llm.plan):
                try:
                    call()
                except RuntimeError as error:
                    print(error, flush=True)
            llm.close()
            assert len(tokens(load(), b"abc")) == N
        def fork():
            inside.wait()
            try:
                child(use)
            finally:
                go_on.set()
        at_once(lambda: llm("abc", stopping_criteria=criterion), fork)
        def in_a_callback(ids, logits):
            child(llm.save_state)
            return False
        llm("abc", max_tokens=2, stopping_criteria=in_a_callback)
    """)  # fmt: skip
    for line in out.splitlines():
        assert "another thread" in line and "load it anew" in line
    assert len(out.splitlines()) == 4
