//! The kit with real arbiters and recording cores.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::shell::Flow;
use super::*;

#[derive(Debug, PartialEq)]
struct Work(usize);

impl Message for Work {
    const KINDS: &'static [&'static str] = &["even", "odd"];
    fn kind(&self) -> usize {
        self.0 % 2
    }
    fn bytes(&self) -> usize {
        10
    }
}

enum Ask {
    Note,
    Stop,
}

/// Reports each thing it sees.
struct Recorder(flume::Sender<String>);

impl Actor for Recorder {
    type Message = Work;
    type Control = Ask;

    fn on_message(&mut self, message: Work, _: &Turn) {
        let _ = self.0.send(message.0.to_string());
    }

    fn on_control(&mut self, message: Ask, _: &Turn) -> Flow {
        let _ = self.0.send("control".into());
        if matches!(message, Ask::Stop) { Flow::Stop } else { Flow::Continue }
    }

    fn on_turn_end(&mut self, _: &Turn) {}
}

const PATIENCE: Duration = Duration::from_secs(10);

fn in_system(test: impl FnOnce(actix_rt::ArbiterHandle)) {
    let system = actix_rt::System::new();
    let arbiter = system.block_on(async { actix_rt::Arbiter::new() });
    test(arbiter.handle());
    arbiter.stop();
    arbiter.join().unwrap();
}

#[test]
fn messages_sent_before_the_start_arrive_in_order_after_control() {
    in_system(|arbiter| {
        let (seen_tx, seen) = flume::unbounded();
        let (sender, inbox) = Inbox::new("recorder", 100, 10_000);
        for i in 0..20 {
            sender.try_send(Work(i)).unwrap();
        }
        sender.control(Ask::Note);
        shell::spawn(&arbiter, inbox, false, || Recorder(seen_tx));
        let first: Vec<_> = (0..21).map(|_| seen.recv_timeout(PATIENCE).unwrap()).collect();
        assert_eq!(first[0], "control");
        assert_eq!(first[1..], (0..20).map(|i| i.to_string()).collect::<Vec<_>>());
        sender.try_send(Work(99)).unwrap();
        assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), "99", "an idle actor wakes up");
    });
}

#[test]
fn full_lane_gives_the_message_back_and_counts() {
    let (sender, inbox) = Inbox::<Work, ()>::new("full", 2, 1000);
    sender.try_send(Work(1)).unwrap();
    sender.try_send(Work(2)).unwrap();
    let refused = sender.try_send(Work(3)).unwrap_err();
    assert_eq!(refused.0, Work(3));
    sender.stats.controls.capacity.store(3, Ordering::Relaxed);
    sender.try_send(Work(3)).expect("capacity is live");
    sender.stats.controls.capacity.store(100, Ordering::Relaxed);
    sender.stats.controls.capacity_bytes.store(35, Ordering::Relaxed);
    sender.try_send(Work(4)).expect_err("bytes bind too");

    let now = sender.stats.snapshot(Instant::now());
    assert_eq!((now.depth, now.bytes, now.depth_max), (3, 30, 3));
    assert_eq!(now.refusals[..2], [("full", 1), ("full_bytes", 1)]);
    assert_eq!(inbox.try_recv(), Some(Work(1)));
    assert_eq!(sender.stats.depth(), 2);
    drop(inbox);
    assert!(sender.try_send(Work(5)).is_err(), "the actor is gone");
}

#[test]
fn pause_holds_data_but_not_control() {
    in_system(|arbiter| {
        let (seen_tx, seen) = flume::unbounded();
        let (sender, inbox) = Inbox::new("paused", 100, 10_000);
        sender.stats.controls.paused.store(true, Ordering::Relaxed);
        shell::spawn(&arbiter, inbox, false, || Recorder(seen_tx));
        sender.try_send(Work(1)).unwrap();
        sender.control(Ask::Note);
        assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), "control");
        assert_eq!(sender.stats.depth(), 1);
        let age = |after: u64| sender.stats.snapshot(Instant::now() + Duration::from_secs(after)).oldest_seconds;
        assert!((60.0..90.0).contains(&age(60)), "{}", age(60));
        sender.stats.controls.paused.store(false, Ordering::Relaxed);
        sender.wake();
        assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), "1");
    });
}

#[test]
fn times_are_counted_by_kind_of_message() {
    in_system(|arbiter| {
        let (seen_tx, seen) = flume::unbounded();
        let (sender, inbox) = Inbox::new("counted", 1000, 100_000);
        shell::spawn(&arbiter, inbox, false, || Recorder(seen_tx));
        for i in 0..100 {
            sender.try_send(Work(i)).unwrap();
        }
        for _ in 0..100 {
            seen.recv_timeout(PATIENCE).unwrap();
        }
        let deadline = Instant::now() + PATIENCE;
        let snapshot = loop {
            let s = sender.stats.snapshot(Instant::now());
            if s.doing.is_none() && s.batch_messages == 100 {
                break s;
            }
            assert!(Instant::now() < deadline, "the turn never ended: {s:?}");
            std::thread::yield_now();
        };
        assert_eq!(snapshot.kinds[0].service.count, 50);
        assert_eq!(snapshot.kinds[1].wait.count, 50);
    });
}

#[test]
fn stopped_actor_refuses() {
    in_system(|arbiter| {
        let (seen_tx, seen) = flume::unbounded();
        let (sender, inbox) = Inbox::new("stopped", 100, 10_000);
        shell::spawn(&arbiter, inbox, false, || Recorder(seen_tx));
        sender.control(Ask::Stop);
        assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), "control");
        assert!(seen.recv_timeout(PATIENCE).is_err(), "the core is dropped with its actor");
        assert!(sender.try_send(Work(1)).is_err());
    });
}

#[test]
fn permits_come_back_when_dropped_and_waiters_keep_their_order() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let gate = Gate::new("gate", 2, 100);
        let a = gate.enter(60).await;
        assert!(gate.try_enter(60).is_none(), "bytes are short");
        assert_eq!(gate.usage(), (1, 2), "a failed entry takes nothing");
        let waiter = tokio::spawn({
            let gate = gate.clone();
            async move { gate.enter(1_000).await }
        });
        tokio::task::yield_now().await;
        assert!(gate.try_enter(1).is_none(), "nobody overtakes who waits");
        assert_eq!(gate.waiting(), 1);
        drop(a);
        let mut b = waiter.await.unwrap();
        assert_eq!(gate.waiting(), 0);
        assert_eq!(gate.usage_bytes(), (100, 100), "more than the gate holds is cut to its size");
        b.shrink_to(1_000);
        b.shrink_to(30);
        assert_eq!(gate.usage_bytes(), (30, 100));
        drop(b);
        assert_eq!((gate.usage(), gate.usage_bytes(), gate.waits()), ((0, 2), (0, 100), 1));
    });
}

#[test]
fn watchdog_names_who_is_stuck() {
    let registry = Registry::default();
    let (sender, _inbox) = Inbox::<Work, ()>::new("slow", 1, 100);
    registry.add(&sender.stats);
    let now = Instant::now();
    assert!(watchdog::stuck(&registry, now).is_empty());
    sender.stats.turn_begins(now);
    sender.stats.works_on(1, now);
    let stuck = watchdog::stuck(&registry, now + Duration::from_secs(5));
    assert_eq!((stuck[0].0, stuck[0].1), ("slow", "odd"));
}

/// Runs `task` in a process of its own, as the test of this name, and answers its exit code.
fn exit_code_of(test: &str, task: impl Future<Output = ()>) -> Option<i32> {
    const CHILD: &str = "ACTOR_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(task);
        std::process::exit(0);
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    let name = format!("actor::tests::{test}");
    let ended = child.args(["--exact", &name]).env(CHILD, "1").output().unwrap();
    ended.status.code()
}

#[test]
fn panic_in_a_vital_task_ends_the_process() {
    let code = exit_code_of("panic_in_a_vital_task_ends_the_process", async {
        let task = tokio::spawn(super::shell::vital("test", async {
            tokio::task::yield_now().await;
            panic!("on purpose");
        }));
        let _: Result<(), _> = task.await;
    });
    assert_eq!(code, Some(2));
}

/// Takes longer for a message than a turn should.
struct Slow(usize);

impl Actor for Slow {
    type Message = Work;
    type Control = Ask;

    fn on_message(&mut self, _: Work, _: &Turn) {
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(1) {
            std::hint::spin_loop();
        }
        self.0 += 1;
    }

    fn on_control(&mut self, _: Ask, _: &Turn) -> Flow {
        Flow::Continue
    }

    fn on_turn_end(&mut self, _: &Turn) {}
}

#[test]
fn no_real_clock_ends_a_stepped_turn() {
    let (sender, inbox) = Inbox::new("slow", 100, 10_000);
    (0..50).for_each(|n| sender.try_send(Work(n)).unwrap());
    let mut stepped = shell::Stepped::new(inbox, Slow(0));
    stepped.turn(Instant::now());
    assert_eq!(stepped.core().0, 50, "a turn ended when a real clock said so");
}
