use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;
use crate::storage::{Bucket, Storage, WriteBatch, mem::MemStorage};

fn granted(leases: &[(i64, i64)]) -> Leases {
    let mut state = Leases::new(2);
    for (id, ttl) in leases {
        state.grant(*id, *ttl, &mut WriteBatch::default()).unwrap();
    }
    state
}

fn key(name: &str) -> Bytes {
    Bytes::copy_from_slice(name.as_bytes())
}

// --- replicated state

#[test]
fn min_ttl_is_one_and_a_half_elections_rounded_up() {
    // L-4, limits.md 8
    assert_eq!(min_ttl(10, 100), 2);
    assert_eq!(min_ttl(5, 100), 1); // 15 / 2 = 7 ticks
    assert_eq!(min_ttl(10, 500), 8); // 7.5 s
}

#[test]
fn grant_checks_the_ttl_before_the_id() {
    // L-2, L-3, L-4
    let mut batch = WriteBatch::default();
    let mut leases = Leases::new(2);
    assert_eq!(leases.grant(7, TTL_MAX, &mut batch), Ok(9_000_000_000));
    assert_eq!(leases.grant(7, TTL_MAX + 1, &mut batch), Err(Error::TtlTooLarge));
    assert_eq!(leases.grant(7, 5, &mut batch), Err(Error::Exists));
    assert_eq!(leases.grant(0, 5, &mut batch), Err(Error::NotFound));
    assert_eq!(leases.grant(8, -4, &mut batch), Ok(2));
    assert_eq!(batch.writes.len(), 2, "a refused grant writes nothing");
}

#[test]
fn rows_are_those_of_an_etcd_store() {
    // files.md 5, H-36
    let mut batch = WriteBatch::default();
    let mut leases = Leases::new(2);
    leases.grant(-2, 60, &mut batch).unwrap();
    leases.checkpoint(-2, 9, true, &mut batch).unwrap();
    leases.checkpoint(-2, 8, false, &mut batch).unwrap();
    leases.revoke(-2, &mut batch).unwrap();
    let row = Bytes::from_static(b"\xff\xff\xff\xff\xff\xff\xff\xfe");
    let granted = b"\x08\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01\x10\x3c".to_vec();
    let checkpointed = [&granted[..], b"\x18\x09"].concat();
    assert_eq!(
        batch.writes,
        [
            (Bucket::Lease, row.clone(), Some(granted.into())),
            (Bucket::Lease, row.clone(), Some(checkpointed.into())),
            (Bucket::Lease, row, None),
        ]
    );
}

#[test]
fn negative_ids_survive_a_restart() {
    // L-1, L-28, H-36
    let rows = MemStorage::new();
    let mut batch = WriteBatch::default();
    let mut leases = Leases::new(2);
    leases.grant(i64::MIN, 60, &mut batch).unwrap();
    leases.grant(-1, 70, &mut batch).unwrap();
    rows.commit(batch).unwrap();
    let mut leases = Leases::load(&rows, 2).unwrap();
    assert_eq!(leases.set().ids().collect::<Vec<_>>(), [i64::MIN, -1]);
    assert_eq!(leases.set().ttl(-1), Some(70));
    assert!(leases.restore_attachment(-1, b"k"));
    assert_eq!(leases.revoke(-1, &mut WriteBatch::default()).unwrap(), [key("k")]);
}

#[test]
fn a_damaged_row_refuses_to_load() {
    for (row, value) in [(&b"\0\0\0\0\0\0\0\x05"[..], &b"\x08\x06"[..]), (b"\0\0\0\0\0\0\0\x05", b"\xff"), (b"", b"")] {
        let rows = MemStorage::new();
        let mut batch = WriteBatch::default();
        batch.put(Bucket::Lease, Bytes::from_static(row), Bytes::from_static(value));
        rows.commit(batch).unwrap();
        assert!(Leases::load(&rows, 2).is_err(), "{row:?} {value:?}");
    }
}

#[test]
fn a_key_follows_its_newest_lease_and_dies_with_it_alone() {
    // L-14, L-29, L-30, L-33
    let mut leases = granted(&[(1, 10), (2, 10)]);
    let mut batch = WriteBatch::default();
    for name in ["c", "a", "b"] {
        leases.attach(1, &key(name));
    }
    leases.attach(2, &key("b"));
    assert_eq!(leases.lease_of(b"b"), 2);
    assert_eq!(leases.revoke(1, &mut batch).unwrap(), [key("a"), key("c")]);
    assert_eq!(leases.revoke(1, &mut batch), Err(Error::NotFound)); // L-15
    assert_eq!(leases.lease_of(b"a"), 0);
    leases.grant(1, 30, &mut batch).unwrap();
    assert_eq!(leases.set().keys(1).count(), 0);
    leases.detach(b"b");
    assert_eq!(leases.lease_of(b"b"), 0);
    assert_eq!(leases.revoke(2, &mut batch).unwrap(), Vec::<Bytes>::new());
}

#[test]
fn a_revoke_returns_a_thousand_keys_in_order() {
    // K-35, L-14
    let mut leases = granted(&[(9, 10)]);
    let mut names: Vec<Bytes> = (0..1000).map(|n| key(&format!("/registry/events/{}", n * 7 % 1000))).collect();
    for name in &names {
        leases.attach(9, name);
    }
    names.sort();
    assert_eq!(leases.revoke(9, &mut WriteBatch::default()).unwrap(), names);
}

#[test]
#[should_panic(expected = "unknown lease")]
fn attaching_to_an_unknown_lease_is_a_broken_invariant() {
    granted(&[]).attach(5, &key("k"));
}

#[test]
fn a_stored_key_of_a_lost_lease_is_attached_to_none() {
    let mut leases = granted(&[]);
    assert!(!leases.restore_attachment(5, b"k"));
    assert_eq!(leases.lease_of(b"k"), 0);
}

#[test]
fn a_view_keeps_its_leases_while_apply_goes_on() {
    let mut leases = granted(&[(1, 10), (2, 20)]);
    leases.attach(1, &key("a"));
    let view = leases.set().clone();
    leases.revoke(1, &mut WriteBatch::default()).unwrap();
    leases.attach(2, &key("a"));
    assert_eq!(view.keys(1).collect::<Vec<_>>(), [b"a"]);
    assert_eq!(view.keys(2).count(), 0);
    assert!(!leases.set().contains(1));
}

/// Random histories beside a naive model, with restarts in between.
#[test]
fn leases_agree_with_a_naive_model() {
    for seed in 0..20 {
        let mut rng = StdRng::seed_from_u64(seed);
        let rows = MemStorage::new();
        let mut leases = Leases::new(2);
        let mut model: BTreeMap<i64, (i64, i64)> = BTreeMap::new();
        let mut model_keys: BTreeMap<Bytes, i64> = BTreeMap::new();
        let mut pinned: Option<(LeaseSet, BTreeMap<i64, Vec<Bytes>>)> = None;
        let keys_of = |model_keys: &BTreeMap<Bytes, i64>, id: i64| -> Vec<Bytes> {
            model_keys.iter().filter(|(_, lease)| **lease == id).map(|(key, _)| key.clone()).collect()
        };
        for step in 0..2000 {
            let mut batch = WriteBatch::default();
            let id = rng.random_range(-8_i64..8);
            let name = key(&format!("k{}", rng.random_range(0..30)));
            match rng.random_range(0..10) {
                0 | 1 => {
                    let ttl = rng.random_range(-1..100);
                    let expected = match model.contains_key(&id) {
                        _ if id == 0 => Err(Error::NotFound),
                        true => Err(Error::Exists),
                        false => {
                            model.insert(id, (ttl.max(2), 0));
                            Ok(ttl.max(2))
                        }
                    };
                    assert_eq!(leases.grant(id, ttl, &mut batch), expected, "seed {seed} step {step}");
                }
                2 => {
                    let expected = match model.remove(&id) {
                        None => Err(Error::NotFound),
                        Some(_) => Ok(keys_of(&model_keys, id)),
                    };
                    model_keys.retain(|_, lease| *lease != id);
                    assert_eq!(leases.revoke(id, &mut batch), expected, "seed {seed} step {step}");
                }
                3 => {
                    let left = rng.random_range(0..50);
                    let known = model.get_mut(&id).map(|lease| lease.1 = left);
                    assert_eq!(leases.checkpoint(id, left, true, &mut batch).is_ok(), known.is_some());
                }
                4 => {
                    leases.detach(&name);
                    model_keys.remove(&name);
                }
                _ if leases.exists(id) => {
                    leases.attach(id, &name);
                    model_keys.insert(name.clone(), id);
                }
                _ => {}
            }
            rows.commit(batch).unwrap();
            if rng.random_range(0..100) == 0 {
                leases = Leases::load(&rows, 2).unwrap();
                for (name, id) in &model_keys {
                    assert!(leases.restore_attachment(*id, name));
                }
            }
            let set = leases.set();
            let expected: Vec<_> = model.iter().map(|(id, (ttl, left))| (*id, *ttl, *left)).collect();
            assert_eq!(set.iter().collect::<Vec<_>>(), expected, "seed {seed} step {step}");
            assert_eq!(set.keys(id).map(Bytes::copy_from_slice).collect::<Vec<_>>(), keys_of(&model_keys, id));
            assert_eq!(leases.lease_of(&name), model_keys.get(&name).copied().unwrap_or(0));
            if let Some((set, keys)) = &pinned {
                for (id, keys) in keys {
                    assert!(set.keys(*id).eq(keys.iter().map(|key| &key[..])), "seed {seed} step {step}");
                }
            }
            if step % 50 == 0 {
                let keys = model.keys().map(|id| (*id, keys_of(&model_keys, *id))).collect();
                pinned = Some((set.clone(), keys));
            }
        }
    }
}

// --- deadlines

const ELECTION_MS: u64 = 1_000;
const REQUEST_MS: u64 = 7_000;
const NOTHING: [i64; 0] = [];

fn leader(leases: &[(i64, i64)]) -> Expirer {
    let mut expirer = Expirer::new(ELECTION_MS, REQUEST_MS, None);
    expirer.on_leader(0, &LeaseSet::default());
    for (id, ttl) in leases {
        expirer.on_granted(*id, *ttl, 0);
    }
    expirer
}

fn renewed(ttl: i64) -> Renewal {
    Renewal::Renewed { ttl, clear_checkpoint: false }
}

#[test]
fn a_lease_ends_at_its_deadline_and_not_before() {
    // L-17
    let mut expirer = leader(&[(1, 10), (2, 5)]);
    assert_eq!(expirer.next_at(), Some(5_000));
    assert_eq!(expirer.tick(4_999), NOTHING);
    assert_eq!(expirer.tick(5_000), [2]);
    assert_eq!(expirer.tick(9_999), NOTHING);
    assert_eq!(expirer.tick(10_000), [1]);
}

#[test]
fn a_renewal_gives_the_whole_time_again() {
    // L-7, L-17, L-20, L-22
    let mut expirer = leader(&[(1, 10)]);
    assert_eq!(expirer.on_renew(1, 9_999), renewed(10));
    assert_eq!(expirer.tick(10_000), NOTHING);
    assert_eq!(expirer.remaining_ms(1, 10_000), Some(9_999));
    assert_eq!(expirer.next_at(), Some(19_999));
    assert_eq!(expirer.tick(19_999), [1]);
    assert_eq!(expirer.remaining_ms(1, 21_000), Some(-1_001));
    assert_eq!(expirer.remaining_ms(2, 21_000), None);
}

#[test]
fn an_expired_lease_is_not_revived_and_then_unknown() {
    // L-8, L-9, L-33
    let mut expirer = leader(&[(1, 10)]);
    assert_eq!(expirer.on_renew(1, 10_000), Renewal::Expired, "its time is over, handed out or not");
    assert_eq!(expirer.tick(10_000), [1]);
    assert_eq!(expirer.on_renew(1, 10_001), Renewal::Expired);
    expirer.on_revoked(1);
    assert_eq!(expirer.on_renew(1, 10_002), Renewal::Unknown);
    expirer.on_granted(1, 3, 11_000);
    assert_eq!(expirer.on_renew(1, 11_001), renewed(3));
    assert_eq!(expirer.tick(14_000), NOTHING);
    assert_eq!(expirer.tick(14_001), [1]);
}

#[test]
fn a_lost_revocation_is_tried_again_after_the_request_timeout() {
    // L-17, limits.md 8
    let mut expirer = leader(&[(1, 10)]);
    assert_eq!(expirer.tick(10_100), [1]);
    assert_eq!(expirer.next_at(), Some(17_100));
    assert_eq!(expirer.tick(17_099), NOTHING);
    assert_eq!(expirer.on_renew(1, 17_099), Renewal::Expired);
    assert_eq!(expirer.tick(17_100), [1]);
    expirer.on_revoked(1);
    assert_eq!(expirer.next_at(), None);
    assert_eq!(expirer.tick(99_999), NOTHING);
}

#[test]
fn stuck_revocations_do_not_hold_up_others_for_ever() {
    // H-42
    let mut expirer = leader(&[(1, 2), (2, 2), (3, 2)]);
    expirer.set_revoking_max(2);
    assert_eq!(expirer.tick(2_000), [1, 2]);
    assert_eq!(expirer.next_at(), Some(9_000), "with no room there is nothing to do before a retry");
    assert_eq!(expirer.tick(9_000), [3, 1], "the one that waits goes first");
    expirer.on_revoked(3);
    assert_eq!(expirer.tick(9_001), [2]);
}

#[test]
fn a_demoted_leader_expires_and_renews_nothing() {
    // L-16, L-19, L-27
    let mut expirer = leader(&[(1, 10), (2, 2)]);
    assert_eq!(expirer.tick(2_000), [2]);
    expirer.on_demoted();
    assert_eq!(expirer.on_renew(1, 3_000), Renewal::NotLeader);
    expirer.on_granted(3, 2, 3_000);
    assert_eq!(expirer.tick(u64::MAX / 2), NOTHING);
    assert_eq!((expirer.remaining_ms(1, 0), expirer.next_at(), expirer.revoking()), (None, None, 0));
    let leases = granted(&[(1, 10), (2, 2), (3, 2)]);
    expirer.on_leader(50_000, leases.set());
    assert_eq!(expirer.tick(52_999), NOTHING);
    assert_eq!(expirer.tick(53_000), [2, 3]);
    expirer.on_revoked(2);
    expirer.on_revoked(3);
    assert_eq!(expirer.tick(61_000), [1]);
}

#[test]
fn a_new_leader_starts_from_the_full_time_or_the_checkpoint() {
    // L-25, L-31, H-39
    let mut leases = granted(&[(1, 600), (2, 600), (3, 60)]);
    leases.checkpoint(2, 30, false, &mut WriteBatch::default()).unwrap();
    let mut expirer = Expirer::new(ELECTION_MS, REQUEST_MS, None);
    expirer.on_leader(5_000, leases.set());
    assert_eq!(expirer.by_remaining(), [2, 3, 1]); // L-24
    assert_eq!(expirer.remaining_ms(1, 5_000), Some(601_000));
    assert_eq!(expirer.remaining_ms(2, 5_000), Some(31_000));
    // The renewal promises the full time, so the checkpoint has to go, once, whether or not this member writes any.
    assert_eq!(expirer.on_renew(2, 6_000), Renewal::Renewed { ttl: 600, clear_checkpoint: true });
    assert_eq!(expirer.on_renew(2, 6_001), renewed(600));
}

#[test]
fn the_first_renewal_after_an_election_drops_the_extension() {
    let leases = granted(&[(1, 10)]);
    let mut expirer = Expirer::new(ELECTION_MS, REQUEST_MS, None);
    expirer.on_leader(0, leases.set());
    assert_eq!(expirer.on_renew(1, 100), renewed(10));
    assert_eq!(expirer.next_at(), Some(10_100));
    assert_eq!(expirer.tick(10_100), [1]);
}

#[test]
fn many_leases_are_spread_after_an_election_never_earlier() {
    // L-26
    let many: Vec<(i64, i64)> = (1..=3_000).map(|id| (id, 10 + id % 2)).collect();
    let mut expirer = Expirer::new(ELECTION_MS, REQUEST_MS, None);
    expirer.on_leader(0, granted(&many).set());
    let ends: BTreeMap<i64, i64> = many.iter().map(|(id, _)| (*id, expirer.remaining_ms(*id, 0).unwrap())).collect();
    assert!(many.iter().all(|(id, ttl)| ends[id] >= ttl * 1000 + 1000));
    for second in 0..20 {
        let ending = ends.values().filter(|end| **end / 1000 == second).count();
        assert!(ending <= 751, "{ending} in second {second}");
    }
    assert!(*ends.values().max().unwrap() <= 11_000 + 4_100, "no later than the pace needs");

    let few: Vec<(i64, i64)> = (1..1_000).map(|id| (id, 10)).collect();
    expirer.on_leader(0, granted(&few).set());
    assert!(few.iter().all(|(id, _)| expirer.remaining_ms(*id, 0) == Some(11_000)));
}

#[test]
fn a_hundred_thousand_at_once_leave_in_order_within_two_seconds() {
    // L-17, G-12: 20 ms from proposal to apply, a tick with each confirmation
    let many: Vec<(i64, i64)> = (1..=100_000).map(|id| (id, 10)).collect();
    let mut expirer = leader(&many);
    let mut log: VecDeque<(u64, i64)> = VecDeque::new();
    let mut revoked = BTreeSet::new();
    let mut now = 9_990;
    while revoked.len() < many.len() {
        now += 1;
        while log.front().is_some_and(|(proposed_at, _)| proposed_at + 20 <= now) {
            let (_, id) = log.pop_front().unwrap();
            expirer.on_revoked(id);
            assert!(revoked.insert(id), "proposed once");
        }
        log.extend(expirer.tick(now).into_iter().map(|id| (now, id)));
        assert!(now >= 10_000 || log.is_empty());
        assert!(log.len() <= 1_000, "at most 1,000 under way");
        assert!(now <= 12_100, "{} left", many.len() - revoked.len());
    }
    assert!(expirer.is_empty());
    assert_eq!(expirer.next_at(), None);
}

#[test]
fn renewals_do_not_grow_memory() {
    // A million renewals: one timer and one place in the queue, throughout.
    let mut expirer = leader(&[(1, 10)]);
    for now in 0..1_000_000 {
        assert_eq!(expirer.on_renew(1, now), renewed(10));
        if now % 1_000 == 0 {
            assert_eq!(expirer.tick(now), NOTHING);
        }
    }
    assert_eq!(expirer.places(), (1, 1));
    for round in 0..10_000 {
        expirer.on_granted(2, TTL_MAX, round);
        expirer.on_revoked(2);
    }
    assert_eq!(expirer.places(), (1, 1), "granting and revoking leaves nothing behind either");
}

#[test]
fn checkpoints_follow_long_leases_that_nobody_renews() {
    // L-31
    let mut expirer = Expirer::new(ELECTION_MS, REQUEST_MS, Some(CHECKPOINT_INTERVAL_MS));
    expirer.on_leader(0, &LeaseSet::default());
    expirer.on_granted(1, 3_600, 500);
    expirer.on_granted(2, 300, 500);
    expirer.on_granted(3, 3_600, 500);
    assert_eq!(expirer.on_renew(3, 200_500), renewed(3_600));
    assert_eq!(expirer.next_checkpoints(300_499), []);
    assert_eq!(checkpoints(&mut expirer, 300_700), [(1, 3_300)], "seconds are rounded up");
    assert_eq!(checkpoints(&mut expirer, 500_500), [(3, 3_300)]);
    assert_eq!(expirer.on_renew(3, 500_600), Renewal::Renewed { ttl: 3_600, clear_checkpoint: true });
    assert_eq!(checkpoints(&mut expirer, 600_700), [(1, 3_000)]);
    expirer.on_revoked(1);
    assert_eq!(checkpoints(&mut expirer, 800_599), []);
    expirer.on_demoted();
    assert_eq!(expirer.next_at(), None);
}

fn checkpoints(expirer: &mut Expirer, now: u64) -> Vec<(i64, i64)> {
    expirer.next_checkpoints(now).into_iter().map(|c| (c.id, c.remaining_ttl)).collect()
}

#[test]
fn checkpoint_requests_hold_at_most_a_thousand_leases() {
    // limits.md 8
    let mut expirer = Expirer::new(ELECTION_MS, REQUEST_MS, Some(CHECKPOINT_INTERVAL_MS));
    expirer.on_leader(0, &LeaseSet::default());
    for id in 1..=2_500 {
        expirer.on_granted(id, 1_000, 0);
    }
    let batches: Vec<usize> = std::iter::repeat_with(|| expirer.next_checkpoints(300_000).len()).take(4).collect();
    assert_eq!(batches, [1_000, 1_000, 500, 0]);
}

/// Random grants, renewals, revocations, losses and demotions: nothing ends before the last promise is over, and
/// everything that ran out is handed out in time.
#[test]
fn no_promise_is_ever_cut_short() {
    // L-17, L-9, L-27
    for seed in 0..30 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut state = Leases::new(2);
        let mut expirer = leader(&[]);
        let mut leading = true;
        let mut promised: BTreeMap<i64, u64> = BTreeMap::new();
        let mut now = 0;
        for _ in 0..3_000 {
            now += rng.random_range(0..300);
            let id = rng.random_range(1..40);
            let batch = &mut WriteBatch::default();
            match rng.random_range(0..12) {
                0..3 => {
                    if let Ok(ttl) = state.grant(id, rng.random_range(2..30), batch) {
                        expirer.on_granted(id, ttl, now);
                        promised.insert(id, now + ttl as u64 * 1000);
                    }
                }
                3..9 => match expirer.on_renew(id, now) {
                    Renewal::Renewed { ttl, .. } => {
                        assert!(state.exists(id));
                        promised.insert(id, now + ttl as u64 * 1000);
                    }
                    Renewal::Expired => assert!(leading && promised[&id] <= now),
                    Renewal::Unknown => assert!(leading && !state.exists(id)),
                    Renewal::NotLeader => assert!(!leading),
                },
                9 if state.revoke(id, batch).is_ok() => expirer.on_revoked(id),
                9 => {}
                10 if rng.random_range(0..20) == 0 => {
                    leading = !leading;
                    if leading {
                        expirer.on_leader(now, state.set());
                    } else {
                        expirer.on_demoted();
                    }
                }
                _ => {}
            }
            for id in expirer.tick(now) {
                assert!(leading && promised[&id] <= now, "seed {seed}: {id} ends early");
                if rng.random_range(0..4) != 0 {
                    state.revoke(id, &mut WriteBatch::default()).expect("handed out once");
                    expirer.on_revoked(id);
                }
            }
            if leading {
                assert_eq!(expirer.len(), state.set().len());
            }
        }
        if !leading {
            expirer.on_leader(now, state.set());
        }
        let mut ended = 0;
        let left = state.set().len();
        while let Some(at) = expirer.next_at() {
            now = now.max(at);
            for id in expirer.tick(now) {
                expirer.on_revoked(id);
                ended += 1;
            }
        }
        assert_eq!(ended, left, "seed {seed}: late but complete");
    }
}
