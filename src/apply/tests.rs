//! The apply core over rows in memory.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{APPLIED_INDEX_KEY, Committed, Core, Error, Reply, Response, Settings, Ticket, read_number};
use crate::{
    cluster::Version,
    pb::etcdserverpb::{
        AlarmRequest, AlarmType, CompactionRequest, DeleteRangeRequest, InternalRaftRequest, LeaseGrantRequest,
        LeaseRevokeRequest, PutRequest, alarm_request::AlarmAction,
    },
    pb::membershippb::ClusterVersionSetRequest,
    storage::{Bucket, Storage, mem::MemStorage},
};

fn settings() -> Settings {
    let release = Version::new(3, 7, 1);
    Settings {
        member_id: 1,
        release,
        min_lease_ttl: 2,
        max_learners: 1,
        persist_lease_checkpoints: false,
        quota_bytes: None,
    }
}

fn open(storage: &Arc<MemStorage>) -> Core {
    let storage: Arc<dyn Storage> = storage.clone();
    Core::open(storage, settings()).unwrap()
}

fn entry(index: u64, request: &InternalRaftRequest) -> Committed {
    Committed { index, term: 2, conf_change: false, data: request.encode_to_vec().into(), ticket: None }
}

fn put(key: &str, lease: i64) -> InternalRaftRequest {
    let put = PutRequest { key: key.to_owned().into(), value: "v".into(), lease, ..Default::default() };
    InternalRaftRequest { put: Some(put), ..Default::default() }
}

fn alarm(action: AlarmAction, kind: AlarmType) -> InternalRaftRequest {
    let alarm = AlarmRequest { action: action as i32, member_id: 1, alarm: kind as i32 };
    InternalRaftRequest { alarm: Some(alarm), ..Default::default() }
}

/// Something of every kind that changes rows.
fn random(rng: &mut StdRng, revision: i64) -> InternalRaftRequest {
    let key = format!("k{}", rng.random_range(0..6));
    let lease = rng.random_range(1..4);
    match rng.random_range(0..12) {
        0..6 => put(&key, if rng.random_bool(0.3) { lease } else { 0 }),
        6 => InternalRaftRequest {
            delete_range: Some(DeleteRangeRequest { key: key.into(), ..Default::default() }),
            ..Default::default()
        },
        7 | 8 => {
            InternalRaftRequest { lease_grant: Some(LeaseGrantRequest { id: lease, ttl: 60 }), ..Default::default() }
        }
        9 => InternalRaftRequest { lease_revoke: Some(LeaseRevokeRequest { id: lease }), ..Default::default() },
        10 => InternalRaftRequest {
            compaction: Some(CompactionRequest { revision: (revision - 3).max(1), physical: false }),
            ..Default::default()
        },
        _ => alarm(AlarmAction::Get, AlarmType::None),
    }
}

fn finish(core: &mut Core) {
    core.commit().unwrap();
    while core.is_cleaning() {
        core.clean_slice(3);
        core.commit().unwrap();
    }
}

fn rows(storage: &MemStorage) -> Vec<(Bucket, Vec<(Bytes, Bytes)>)> {
    Bucket::ALL.iter().map(|bucket| (*bucket, storage.rows(*bucket))).collect()
}

#[test]
fn cluster_version_above_the_own_release_ends_the_member() {
    // C-34: before anything of it is stored
    let set = |version: &str| InternalRaftRequest {
        cluster_version_set: Some(ClusterVersionSetRequest { ver: version.to_owned() }),
        ..Default::default()
    };
    let storage = Arc::new(MemStorage::new());
    let mut core = open(&storage);
    core.apply(entry(1, &set("3.7.0")));
    core.commit().unwrap();
    let before = rows(&storage);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| core.apply(entry(2, &set("3.8.0")))));
    let text = caught.unwrap_err().downcast::<String>().unwrap();
    assert!(text.contains("invalid downgrade; server version is lower than determined cluster version"), "{text}");
    assert_eq!(rows(&storage), before);
}

#[test]
fn batches_cut_anywhere_give_the_same_rows() {
    // D-4
    for seed in 0..40 {
        let mut rng = StdRng::seed_from_u64(seed);
        let (one, many) = (Arc::new(MemStorage::new()), Arc::new(MemStorage::new()));
        let (mut first, mut second) = (open(&one), open(&many));
        for index in 1..=60 {
            let request = random(&mut rng, first.view().kv.revision);
            first.apply(entry(index, &request));
            finish(&mut first);
            second.apply(entry(index, &request));
            if rng.random_bool(0.3) {
                second.commit().unwrap();
            }
        }
        finish(&mut second);
        assert_eq!(rows(&one), rows(&many), "seed {seed}");
    }
}

#[test]
fn replay_after_a_crash_gives_the_rows_of_a_member_that_did_not_crash() {
    // D-2, D-3
    for seed in 0..40 {
        let mut rng = StdRng::seed_from_u64(seed);
        let (steady, crashing) = (Arc::new(MemStorage::new()), Arc::new(MemStorage::new()));
        let (mut first, mut second) = (open(&steady), open(&crashing));
        let mut log = Vec::new();
        for index in 1..=60 {
            let request = random(&mut rng, first.view().kv.revision);
            first.apply(entry(index, &request));
            finish(&mut first);
            second.apply(entry(index, &request));
            log.push(request);
            if rng.random_bool(0.5) {
                second.commit().unwrap();
            }
            if rng.random_bool(0.1) {
                crashing.sync().unwrap();
            }
            if rng.random_bool(0.1) {
                crashing.crash(rng.random_range(0..=crashing.unsynced_batches()));
                second = open(&crashing);
                let applied = second.applied_index();
                assert_eq!(read_number(&*crashing, APPLIED_INDEX_KEY).unwrap(), applied);
                // The log may repeat what is applied already.
                for again in applied.saturating_sub(3).max(1)..=index {
                    second.apply(entry(again, &log[again as usize - 1]));
                }
            }
        }
        finish(&mut second);
        assert_eq!(rows(&steady), rows(&crashing), "seed {seed}");
    }
}

#[test]
fn revoked_lease_takes_its_keys_in_one_revision() {
    // L-14
    let storage = Arc::new(MemStorage::new());
    let mut core = open(&storage);
    let grant = InternalRaftRequest { lease_grant: Some(LeaseGrantRequest { id: 7, ttl: 60 }), ..Default::default() };
    core.apply(entry(1, &grant));
    for (index, key) in ["b", "a", "c"].iter().enumerate() {
        core.apply(entry(2 + index as u64, &put(key, 7)));
    }
    core.commit().unwrap();
    let revoke = InternalRaftRequest { lease_revoke: Some(LeaseRevokeRequest { id: 7 }), ..Default::default() };
    core.apply(entry(5, &revoke));
    let effects = core.commit().unwrap().unwrap();
    let deleted: Vec<(i64, i64, &[u8])> =
        effects.changes.iter().map(|c| (c.revision.main, c.revision.sub, &c.key[..])).collect();
    assert_eq!(deleted, [(5, 0, &b"a"[..]), (5, 1, b"b"), (5, 2, b"c")]);
    assert!(!core.view().leases.contains(7));
}

#[test]
fn alarms_bind_after_a_restart_and_until_they_are_gone() {
    // M-10 to M-13
    let storage = Arc::new(MemStorage::new());
    let mut core = open(&storage);
    core.apply(entry(1, &put("a", 0)));
    core.apply(entry(2, &alarm(AlarmAction::Activate, AlarmType::Nospace)));
    core.commit().unwrap();
    let mut core = open(&storage);
    assert!(core.view().alarms.is_active(AlarmType::Nospace));
    core.apply(entry(3, &put("b", 0)));
    core.commit().unwrap();
    assert_eq!(core.view().kv.revision, 2, "a put is refused");
    let delete = DeleteRangeRequest { key: "a".into(), ..Default::default() };
    let delete = InternalRaftRequest { delete_range: Some(delete), ..Default::default() };
    core.apply(entry(4, &delete));
    core.commit().unwrap();
    assert_eq!(core.view().kv.revision, 3, "a delete is not");
    core.apply(entry(5, &alarm(AlarmAction::Deactivate, AlarmType::Nospace)));
    core.apply(entry(6, &put("b", 0)));
    core.commit().unwrap();
    assert_eq!(core.view().kv.revision, 4);
    assert!(storage.rows(Bucket::Alarm).is_empty());
}

#[test]
fn refused_entries_move_the_applied_index_too() {
    // H-19
    let storage = Arc::new(MemStorage::new());
    let mut core = open(&storage);
    core.apply(entry(1, &put("a", 99)));
    core.commit().unwrap();
    assert_eq!(open(&storage).applied_index(), 1);
    assert_eq!(core.view().kv.revision, 1);
}

#[test]
#[should_panic(expected = "gap in the committed log")]
fn gap_in_the_log_ends_the_process() {
    open(&Arc::new(MemStorage::new())).apply(entry(2, &put("a", 0)));
}

#[test]
#[should_panic(expected = "must not be skipped")]
fn unknown_entry_ends_the_process() {
    open(&Arc::new(MemStorage::new())).apply(entry(1, &InternalRaftRequest { id: 5, ..Default::default() }));
}

#[test]
fn physical_compaction_answers_with_its_hash() {
    // M-30, KV-78
    let mut core = open(&Arc::new(MemStorage::new()));
    core.apply(entry(1, &put("a", 0)));
    core.apply(entry(2, &put("a", 0)));
    let compaction = Some(CompactionRequest { revision: 3, physical: true });
    let request = InternalRaftRequest { compaction, ..Default::default() };
    let (reply, _) = super::Reply::new(0);
    let ticket = super::Ticket {
        request: Box::new(request.clone()),
        reply,
        deadline: std::time::Instant::now(),
        permit: crate::actor::Gate::new("test", 1, 100).try_enter(1).unwrap(),
    };
    core.apply(Committed { ticket: Some(ticket), ..entry(3, &request) });
    assert!(core.commit().unwrap().unwrap().answers.is_empty(), "its rows are there");
    let job = core.take_hash_job().unwrap();
    core.clean_slice(100);
    assert!(!core.is_cleaning());
    assert!(core.commit().unwrap().unwrap().answers.is_empty(), "its hash is not");
    assert!(core.commit().unwrap().is_none());
    core.hashed(Some(job.run().unwrap()));
    assert!(matches!(core.commit().unwrap().unwrap().answers[..], [(_, Ok(Response::Compact(_)))]));
    assert_eq!(core.view().kv.hashes.at(3).unwrap().compact_revision, -1);
    // The state of a snapshot goes on with it.
    let mut next = open(&Arc::new(MemStorage::new()));
    next.follow(&core);
    assert!(next.view().kv.hashes.at(3).is_some());
    assert!(!next.is_compacting());
}

#[test]
fn unknown_alarm_action_is_an_error() {
    // M-9
    let mut core = open(&Arc::new(MemStorage::new()));
    let (reply, _) = super::Reply::new(0);
    let gate = crate::actor::Gate::new("test", 1, 100);
    let request =
        InternalRaftRequest { alarm: Some(AlarmRequest { action: 9, ..Default::default() }), ..Default::default() };
    let ticket = super::Ticket {
        request: Box::new(request.clone()),
        reply,
        deadline: std::time::Instant::now(),
        permit: gate.try_enter(1).unwrap(),
    };
    core.apply(Committed { ticket: Some(ticket), ..entry(1, &request) });
    let effects = core.commit().unwrap().unwrap();
    assert!(matches!(effects.answers[0].1, Err(Error::AlarmAction(9))));
    assert_eq!(gate.usage(), (0, 1), "the permit is back");
    assert!(!matches!(effects.answers[0].1, Ok(Response::Done)));
}

#[test]
fn callers_whose_entries_a_snapshot_covers_are_told_though_nothing_is_stored() {
    let storage = Arc::new(MemStorage::new());
    let mut core = open(&storage);
    core.apply(entry(1, &put("a", 0)));
    core.commit().unwrap();
    let gate = crate::actor::Gate::new("test", 1, 1);
    let (reply, _answer) = Reply::new(0);
    let ticket = Ticket {
        request: Box::new(put("a", 0)),
        reply,
        deadline: std::time::Instant::now(),
        permit: gate.try_enter(1).unwrap(),
    };
    core.apply(Committed { ticket: Some(ticket), ..entry(1, &put("a", 0)) });
    let effects = core.commit().unwrap().expect("somebody waits");
    assert!(matches!(effects.answers[..], [(_, Err(Error::Timeout))]));
    assert!(core.commit().unwrap().is_none());
}
