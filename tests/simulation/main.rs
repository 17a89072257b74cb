//! A whole cluster in one thread, on simulated network, disk and time, all from one seed. How to read and rerun a
//! failure: README.md beside this file.

mod client;
mod faults;
mod member;
mod model;
mod plan;
mod requests;
mod run;
mod truth;
mod turns;
mod watcher;
mod watching;
mod world;

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use actd::sim::Bug;

use plan::{Focus, Plan, SECOND};
use run::{Least, ORPHAN, Report, run, shrunk};

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Seeds that CI runs.
const SEEDS: u64 = 2_000;

/// Failures that are enough.
const FAILURES: usize = 5;

/// Runs seeds from `first` on, on all cores, until there are enough of them.
fn many(first: u64, seeds: u64, seconds: Option<u64>) -> (Report, Duration) {
    let began = Instant::now();
    let next = AtomicU64::new(first);
    let failures = Mutex::new(BTreeMap::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        let mut total = Report::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let is_over = match seconds {
                Some(seconds) => began.elapsed() >= Duration::from_secs(seconds),
                None => seed >= first + seeds,
            };
            let failed = failures.lock().expect("nobody panics with it").len();
            if is_over || failed >= FAILURES {
                return total;
            }
            if seed > first && (seed - first).is_multiple_of(10_000) {
                println!("{} seeds in {:?}, {failed} failed", seed - first, began.elapsed());
            }
            match run(&Plan::new(seed), None) {
                Ok(report) => total.add(&report),
                Err(failure) => {
                    println!("seed {seed}: {failure}");
                    failures.lock().expect("nobody panics with it").insert(seed, failure);
                }
            }
        }
    };
    let mut total = Report::default();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().for_each(|thread| total.add(&thread.join().expect("failures are results")));
    });
    let failures = failures.into_inner().expect("nobody panics with it");
    if let Some((seed, failure)) = failures.first_key_value() {
        println!("{total}");
        panic!("seed {seed}: {failure}\n{}", shrunk(&Plan::new(*seed), None));
    }
    (total, began.elapsed())
}

#[test]
fn no_seed_breaks_a_promise() {
    run::quiet();
    if let Some(seed) = variable("SIM_SEED") {
        match run(&Plan::new(seed), None) {
            Ok(report) => println!("seed {seed}: {report}"),
            Err(failure) => panic!("seed {seed}: {failure}\n{}", shrunk(&Plan::new(seed), None)),
        }
        return;
    }
    let first = variable("SIM_FIRST").unwrap_or(0);
    let seeds = variable("SIM_SEEDS").unwrap_or(if cfg!(debug_assertions) { SEEDS / 20 } else { SEEDS });
    let (total, took) = many(first, seeds, variable("SIM_SECONDS"));
    let simulated = total.simulated / SECOND;
    println!("{total}");
    println!(
        "{simulated} s simulated in {:.1} s: {:.0} times real time",
        took.as_secs_f64(),
        simulated as f64 / took.as_secs_f64()
    );
    if variable("SIM_SECONDS").is_none() && first == 0 && seeds >= 100 {
        let Least(simulated, calls, faults) = total.least;
        let text = format!("the least of a seed: {simulated} µs simulated, {calls} calls, {faults} faults");
        println!("{text}");
        assert!(simulated >= 20 * SECOND && calls >= 300 && faults >= 3, "seeds are too quiet; {text}");
        let is_missed = |effect: &&str| !total.marks.contains_key(effect);
        let missed: Vec<&str> = EFFECTS.into_iter().filter(is_missed).collect();
        assert!(missed.is_empty(), "no fault did this: {missed:#?}");
        // Few seeds reach few of them.
        for branch in RARE.iter().filter(|_| seeds >= SEEDS) {
            assert!(total.marks.get(*branch).is_some_and(|count| *count > 0), "no seed reached: {branch}");
        }
        // A leader that is removed does its best to be heard.
        let orphans = total.marks.get(ORPHAN).copied().unwrap_or(0);
        assert!(seeds < SEEDS || orphans * 500 <= seeds, "{orphans} of {seeds} seeds: {ORPHAN}");
    }
}

/// What each fault must have done in a hundred seeds: noted where it acts, so that a fault that does nothing is missed.
const EFFECTS: [&str; 25] = [
    "a client asks again",
    "a cut keeps a message back",
    "a cut of one direction keeps a message back",
    "a message is lost",
    "a message is lost in a lossy time",
    "a message comes late",
    "a message comes twice",
    "a message comes behind one that was sent later",
    "an event waits for a member that stands still",
    "a write waits for a slow disk",
    "a batch waits for a slow applier",
    "a write of the log fails",
    "a write found no room",
    "a commit of the store fails",
    "a power loss took what a file had not synced",
    "a power loss took what a store had not synced",
    "all are down at once",
    "a start sees a clock that was set",
    "a transfer moves leadership",
    "a defragmentation waited for clean-up",
    "a bit of the log flipped",
    "a log lost what was synced",
    "learner added",
    "learner promoted",
    "a removed member ends",
];

/// What the seeds of CI must reach.
const RARE: [&str; 36] = [
    "a cut keeps a snapshot back",
    "a sync of the log fails",
    "the log's disk is full",
    "a start finds a disk that is full or fails",
    "a sync of the store fails",
    "who stops has handed over",
    "snapshot installed",
    "snapshot during an election",
    "snapshot send interrupted",
    "a second snapshot while one is taken in",
    "compaction goes on after a restart",
    "torn end of the log is cut",
    "the log's disk failed",
    "damaged data is refused at start",
    "a log that lost its end is noticed by what the leader says",
    "a flipped bit did no harm",
    "a lost member is replaced",
    "slow watcher falls behind",
    "a watch hub saw the revision jump",
    "lease ran out",
    "lease checkpoint",
    "learner promoted",
    "leadership handed over",
    "leadership confirmed after a pause",
    "an append was rejected, and is sent again",
    "a watch resumed where it had ended",
    "a watch was cancelled by a compaction",
    "a watch went on after a compaction",
    "a part of a snapshot is refused",
    "a snapshot with a flipped bit is refused",
    "a write is complete, and nobody was told",
    "the store's disk failed",
    "stopped in order",
    "an interrupted installation is completed at start",
    "a snapshot covers entries that wait for apply",
    "one voter is left",
];

#[test]
fn one_seed_is_one_run() {
    run::quiet();
    for seed in [1, 7, 33, 64, 99] {
        let digests: Vec<u64> = (0..2)
            .map(|_| match run(&Plan::new(seed), None) {
                Ok(report) => report.digest,
                Err(failure) => panic!("seed {seed}: {failure}"),
            })
            .collect();
        println!("seed {seed}: digest {:016x}", digests[0]);
        assert_eq!(digests[0], digests[1], "seed {seed} ran differently");
    }
}

/// Seeds within which each bug must be found.
const BUDGET: u64 = 1_500;

/// Mistakes that show only when several things come together, and where seeds had better look. Without optimisation these
/// take too long.
const RARE_BUGS: [(Bug, Focus); 6] = [
    (Bug::RepeatedReadContext, Focus::Reads),
    (Bug::SnapshotKeepsEntries, Focus::Snapshots),
    (Bug::LogDroppedTooEarly, Focus::Nothing),
    (Bug::ResumedCompaction, Focus::Compaction),
    (Bug::RevisionGoesDown, Focus::Compaction),
    (Bug::RevokeAfterLeadership, Focus::Leases),
];

/// What a bug must be found by: one of these is in the text.
fn symptoms(bug: Bug) -> &'static [&'static str] {
    match bug {
        Bug::AckBeforeSync => &["the log ends at", "is in no log", "is not what was applied elsewhere"],
        Bug::AppliedIndexBeforeData | Bug::DataWithoutAppliedIndex => &["differ in state", "starts at revision"],
        Bug::ProgressOvertakesEvents => &["overtakes"],
        Bug::EarlyProgress => &["before the start"],
        Bug::WatchGoesBack
        | Bug::EventTwice
        | Bug::SlowWatcherLosesEvents
        | Bug::EarlyEvents
        | Bug::CompactionTakesDelete => &["a watch of"],
        Bug::RevisionGoesDown => &["starts at revision"],
        Bug::SnapshotKeepsEntries => &["out of range", "gap in the committed log"],
        Bug::UncheckedTxn => &["request "],
        Bug::ResumedCompaction => &["nobody compacted", "differ in"],
        Bug::InstallKeepsOldStore => &["ViewOutdated", "differ in state", "holds other keys"],
        Bug::RepeatedReadContext => &["a read began after revision"],
        Bug::LogDroppedTooEarly => &["the log begins after"],
        Bug::RevokeOrder => &["differ in state", "a watch of", "the order of deletions"],
        Bug::AnswerBeforeInForce => &["before it is in force"],
        Bug::RevokeAfterLeadership => &["ran out at"],
        Bug::NoSync => &["log is damaged", "the log ends at"],
    }
}

#[test]
fn every_seeded_bug_is_found() {
    run::quiet();
    let only = std::env::var("SIM_BUG").ok();
    let mut found = BTreeMap::new();
    if let Some(only) = &only {
        let names: Vec<String> = Bug::ALL.iter().map(|bug| format!("{bug:?}")).collect();
        assert!(names.contains(only), "SIM_BUG={only} is none of {}", names.join(", "));
    }
    let is_wanted = |bug: &Bug| match &only {
        Some(only) => *only == format!("{bug:?}"),
        None => !cfg!(debug_assertions) || !RARE_BUGS.iter().any(|(rare, _)| rare == bug),
    };
    let bugs: Vec<Bug> = Bug::ALL.into_iter().filter(is_wanted).collect();
    // Else it says how many seeds run without a bug.
    let budget = only.as_ref().and_then(|_| variable("SIM_SEEDS")).unwrap_or(BUDGET);
    let next = AtomicU64::new(0);
    let work = || {
        let mut found = Vec::new();
        while let Some(bug) = bugs.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            let focus = RARE_BUGS.iter().find(|(rare, _)| rare == bug).map(|(_, focus)| *focus);
            let fails = |seed| {
                let plan = Plan::with_focus(seed, focus);
                let text = run(&plan, Some(*bug)).err()?.to_string();
                let is_it = symptoms(*bug).iter().any(|symptom| text.contains(symptom));
                if is_it && let Err(failure) = run(&plan, None) {
                    panic!("seed {seed} with {focus:?} fails without a bug: {failure}");
                }
                is_it.then_some((seed, text))
            };
            let hit = (0..budget).find_map(fails);
            found.push((format!("{bug:?}"), hit));
        }
        found
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            found.extend(thread.join().expect("failures are results"));
        }
    });
    let mut missed = Vec::new();
    for (bug, hit) in &found {
        match hit {
            Some((seed, text)) => println!("{bug:<26} after {:>3} seeds: {text}", seed + 1),
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not found within {budget} seeds: {missed:?}");
}
