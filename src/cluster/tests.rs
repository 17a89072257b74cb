use std::collections::BTreeSet;

use bytes::Bytes;
use prost::Message;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{
    bootstrap::{self, InitialCluster},
    ids::{self, RequestIds},
    *,
};
use crate::{
    pb::{
        etcdserverpb,
        membershippb::{Attributes, ClusterMemberAttrSetRequest, ClusterVersionSetRequest, DowngradeInfoSetRequest},
        raftpb::{ConfChange, ConfChangeType, ConfState},
    },
    storage::{Bucket, Storage, WriteBatch, mem::MemStorage},
};

type Rows = MemStorage;

trait Texts {
    fn text(&self, bucket: Bucket, key: &str) -> Option<String>;
    fn put(&self, bucket: Bucket, key: &'static str, value: &'static str);
}

impl Texts for MemStorage {
    fn text(&self, bucket: Bucket, key: &str) -> Option<String> {
        let value = self.get(bucket, key.as_bytes()).unwrap()?;
        Some(String::from_utf8(value.to_vec()).unwrap())
    }

    fn put(&self, bucket: Bucket, key: &'static str, value: &'static str) {
        let mut batch = WriteBatch::default();
        batch.put(bucket, key.as_bytes(), value.as_bytes());
        self.commit(batch).unwrap();
    }
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn voter(id: u64, url: &str) -> Member {
    Member { id, peer_urls: strings(&[url]), ..Member::default() }
}

fn learner(id: u64, url: &str) -> Member {
    Member { is_learner: true, ..voter(id, url) }
}

fn update(id: u64, url: &str) -> Change {
    Change::Update { id, peer_urls: strings(&[url]) }
}

fn attributes(id: u64, name: &str, client_urls: &[&str]) -> ClusterMemberAttrSetRequest {
    let attributes = Attributes { name: name.to_owned(), client_urls: strings(client_urls) };
    ClusterMemberAttrSetRequest { member_id: id, member_attributes: Some(attributes) }
}

fn apply(members: &mut Members, change: Change) -> Result<(), Refusal> {
    members.apply(change, 1, &mut WriteBatch::default())
}

fn cluster(of: impl IntoIterator<Item = Member>) -> Members {
    let mut members = Members::default();
    for member in of {
        apply(&mut members, Change::Add(member)).unwrap();
    }
    members
}

// --- ids

#[test]
fn ids_of_a_default_start_are_etcds() {
    // C-1, C-2, limits.md 15
    let id = ids::member_id_for_bootstrap(&strings(&["http://localhost:2380"]), "etcd-cluster");
    assert_eq!((ids::hex(id).as_str(), id), ("8e9e05c52164694d", 10_276_657_743_932_975_437));
    let cluster = ids::cluster_id(&[id]);
    assert_eq!((ids::hex(cluster).as_str(), cluster), ("cdf818194e3a8c32", 14_841_639_068_965_178_418));
}

#[test]
fn the_order_of_urls_and_members_does_not_matter() {
    // C-1, C-2; values computed apart
    let id = |urls: &[&str]| ids::member_id_for_add(&strings(urls), 1_700_000_000);
    assert_eq!(id(&["http://b:1", "http://a:1"]), 0x7b97_7714_42ac_ae57);
    assert_eq!(id(&["http://b:1", "http://a:1"]), id(&["http://a:1", "http://b:1"]));
    let (a, b, c) = (0x938e_7772_cd22_77e3, 0xa854_1d93_194c_0035, 0xf0f4_3b40_119c_769e);
    assert_eq!(ids::cluster_id(&[c, a, b]), 0xb7d3_aeee_6f77_f03c);
    assert_eq!(ids::hex(0xabc), "abc");
}

#[test]
fn request_ids_count_on_from_the_time_of_the_start() {
    // limits.md 15
    let mut ids = RequestIds::new(0x1234_5678_9abc_def0, 0xabcd_ef01_2345_6789);
    assert_eq!(ids.next_id(), 0xdef0_0123_4567_8901);
    assert_eq!(ids.next_id(), 0xdef0_0123_4567_8902);
    let mut ids = RequestIds::new(0xffff, (1 << 40) - 1);
    for _ in 0..255 {
        ids.next_id();
    }
    assert_eq!(ids.next_id(), 0xffff_0000_0000_0000, "the counter wraps within its 48 bits");
    let mut ids = RequestIds::new(0x8000, (1 << 40) - 1);
    for _ in 0..254 {
        ids.next_id();
    }
    assert_eq!(ids.next_lease_id(), 0xffff_ffff_ffff, "the top bit is cleared");
    assert_eq!(ids.next_lease_id(), 1, "0 is no lease");
}

// --- versions

#[test]
fn versions_are_compared_as_numbers() {
    // C-32, C-34
    let version = |text: &str| text.parse::<Version>().unwrap();
    assert_eq!(version("3.7.1").cluster_version().to_string(), "3.7.0");
    assert!(version("3.10.0") > version("3.9.9"));
    assert_eq!(version("3.8.0-alpha.1+git"), Version::new(3, 8, 0));
    assert!(version("3.6.5").is_one_minor_below(version("3.7.0")));
    assert!(!version("3.5.0").is_one_minor_below(version("3.7.0")));
    assert!(!version("2.6.0").is_one_minor_below(version("3.7.0")));
    for bad in ["", "3", "3.7", "3.7.1.0", "3.x.1", "3..1", "+3.7.1", "3.7.99999999999999999999", "v3.7.1"] {
        assert!(bad.parse::<Version>().is_err(), "{bad}");
    }
}

// --- membership changes in entries

#[test]
fn contexts_are_spelt_as_etcd_spells_them() {
    // files.md 6.3
    let started = Member { name: "a".to_owned(), ..voter(u64::MAX, "http://h:1") };
    let cases = [
        (
            Change::Add(started),
            ConfChangeType::ConfChangeAddNode,
            Some(r#"{"id":18446744073709551615,"peerURLs":["http://h:1"],"name":"a"}"#),
        ),
        (
            Change::Add(voter(7, "http://h:1")),
            ConfChangeType::ConfChangeAddNode,
            Some(r#"{"id":7,"peerURLs":["http://h:1"]}"#),
        ),
        (
            Change::Add(learner(7, "http://h:1")),
            ConfChangeType::ConfChangeAddLearnerNode,
            Some(r#"{"id":7,"peerURLs":["http://h:1"],"isLearner":true}"#),
        ),
        (Change::Promote(7), ConfChangeType::ConfChangeAddNode, Some(r#"{"id":7,"peerURLs":null,"isPromote":true}"#)),
        (update(7, "http://h:2"), ConfChangeType::ConfChangeUpdateNode, Some(r#"{"id":7,"peerURLs":["http://h:2"]}"#)),
        (Change::Remove(7), ConfChangeType::ConfChangeRemoveNode, None),
    ];
    for (change, change_type, context) in cases {
        let encoded = change.encode(5);
        assert_eq!((encoded.id, encoded.node_id), (Some(5), Some(change.member_id())));
        assert_eq!(encoded.r#type, Some(i32::from(change_type)));
        assert_eq!(encoded.context.as_deref(), context.map(str::as_bytes), "{change:?}");
        assert_eq!(Change::decode(&encoded).unwrap(), change);
    }
    assert_eq!(Change::Remove(7).encode(0).encode_to_vec(), b"\x10\x01\x18\x07", "request id 0 is left out");
}

#[test]
fn texts_are_escaped_as_etcd_escapes_them() {
    let name = "<a&b>\u{2028}\u{2029}\"\\\u{1}\u{7f}ü";
    let change = Change::Add(Member { name: name.to_owned(), ..voter(1, "http://h:1") });
    let encoded = change.encode(1);
    let expected = r#"{"id":1,"peerURLs":["http://h:1"],"name":"\u003ca\u0026b\u003e\u2028\u2029\"\\\u0001"#;
    let expected = format!("{expected}\u{7f}ü\"}}");
    assert_eq!(encoded.context.as_deref(), Some(expected.as_bytes()));
    assert_eq!(Change::decode(&encoded).unwrap(), change);
}

#[test]
fn changes_that_cannot_be_read_are_errors() {
    let change = |change_type, node_id, context: Option<&'static str>| ConfChange {
        id: None,
        r#type: change_type,
        node_id: Some(node_id),
        context: context.map(Bytes::from),
    };
    for bad in [
        change(None, 1, None),
        change(Some(0), 1, Some("{")),
        change(Some(0), 1, Some(r#"{"id":-1}"#)),
        change(Some(0), 1, Some(r#"{"id":2,"peerURLs":["http://h:1"]}"#)),
        change(Some(0), 1, Some(r#"{"id":1,"peerURLs":["http://h:1"],"isLearner":true}"#)),
        change(Some(3), 1, Some(r#"{"id":1,"peerURLs":["http://h:1"]}"#)),
        change(Some(4), 1, Some(r#"{"id":1}"#)),
    ] {
        assert!(Change::decode(&bad).is_err(), "{bad:?}");
    }
    // Left-out zeros and fields of later releases are fine.
    let sparse = change(None, 1, Some(r#"{"id":1,"peerURLs":["http://h:1"],"clientURLs":null,"later":{}}"#));
    assert_eq!(Change::decode(&sparse).unwrap(), Change::Add(voter(1, "http://h:1")));
}

// --- replicated state

#[test]
fn apply_refuses_what_etcd_refuses() {
    // C-8, C-11, C-14, C-18, C-21, files.md 6.3
    let mut members = cluster([voter(1, "http://a:1"), voter(2, "http://b:1"), learner(3, "http://c:1")]);
    apply(&mut members, Change::Remove(2)).unwrap();
    let before = members.list();
    let cases = [
        (Change::Add(voter(1, "http://z:1")), Refusal::Exists),
        (Change::Add(voter(1, "http://a:1")), Refusal::Exists),
        (Change::Add(voter(2, "http://b:1")), Refusal::Removed),
        (Change::Add(voter(4, "http://c:1")), Refusal::PeerUrlExists),
        (Change::Add(learner(4, "http://d:1")), Refusal::TooManyLearners),
        (Change::Add(learner(4, "http://a:1")), Refusal::PeerUrlExists),
        (Change::Promote(9), Refusal::NotFound),
        (Change::Promote(2), Refusal::Removed),
        (Change::Promote(1), Refusal::NotLearner),
        (update(9, "http://z:1"), Refusal::NotFound),
        (update(2, "http://z:1"), Refusal::Removed),
        (update(1, "http://c:1"), Refusal::PeerUrlExists),
        (Change::Remove(9), Refusal::NotFound),
        (Change::Remove(2), Refusal::Removed),
    ];
    for (change, refusal) in cases {
        let mut batch = WriteBatch::default();
        assert_eq!(members.apply(change.clone(), 1, &mut batch), Err(refusal), "{change:?}");
        assert!(batch.is_empty() && members.list() == before, "a refused change changes nothing");
    }
    assert_eq!(members.check(&Change::Add(learner(4, "http://d:1")), 2), Ok(()), "the limit is a setting");
    assert_eq!(members.check(&update(1, "http://a:1"), 1), Ok(()), "its own URL is no other member's");
    assert_eq!(members.check(&Change::Add(voter(4, "http://b:1")), 1), Ok(()), "URLs of removed members are free");
}

#[test]
fn rows_are_those_of_an_etcd_store() {
    // files.md 5, C-5, C-6, C-23, H-34
    let rows = Rows::default();
    let mut members = Members::default();
    let mut step = |change: &dyn Fn(&mut Members, &mut WriteBatch)| {
        let mut batch = WriteBatch::default();
        change(&mut members, &mut batch);
        rows.commit(batch).unwrap();
        rows.text(Bucket::Members, "abc")
    };
    let row = step(&|m, b| m.apply(Change::Add(learner(0xabc, "http://h:1")), 1, b).unwrap());
    assert_eq!(row.as_deref(), Some(r#"{"id":2748,"peerURLs":["http://h:1"],"isLearner":true}"#));
    let row = step(&|m, b| m.apply(update(0xabc, "http://h:2"), 1, b).unwrap());
    assert_eq!(row.as_deref(), Some(r#"{"id":2748,"peerURLs":["http://h:2"],"isLearner":true}"#));
    let row = step(&|m, b| m.set_attributes(attributes(0xabc, "n", &["http://h:9"]), b).unwrap());
    let published = r#"{"id":2748,"peerURLs":["http://h:2"],"isLearner":true,"name":"n","clientURLs":["http://h:9"]}"#;
    assert_eq!(row.as_deref(), Some(published));
    let row = step(&|m, b| m.apply(Change::Promote(0xabc), 1, b).unwrap());
    let promoted = r#"{"id":2748,"peerURLs":["http://h:2"],"name":"n","clientURLs":["http://h:9"]}"#;
    assert_eq!(row.as_deref(), Some(promoted));
    let row = step(&|m, b| {
        m.apply(Change::Remove(0xabc), 1, b).unwrap();
        let version = ClusterVersionSetRequest { ver: "3.7.0".to_owned() };
        m.set_version(&version, Version::new(3, 7, 1), b).unwrap();
        m.set_downgrade(DowngradeInfoSetRequest { enabled: true, ver: "3.6.0".to_owned() }, b);
    });
    assert_eq!(row, None);
    assert_eq!(rows.text(Bucket::MembersRemoved, "abc").as_deref(), Some("removed"));
    assert_eq!(rows.text(Bucket::Cluster, "clusterVersion").as_deref(), Some("3.7.0"));
    let downgrade = r#"{"target-version":"3.6.0","enabled":true}"#;
    assert_eq!(rows.text(Bucket::Cluster, "downgrade").as_deref(), Some(downgrade));
    let loaded = Members::load(&rows).unwrap();
    assert!(loaded.is_removed(0xabc) && loaded.downgrade().enabled);
    assert_eq!(loaded.cluster_version(), Some(Version::new(3, 7, 0)));
    step(&|m, b| m.set_downgrade(DowngradeInfoSetRequest::default(), b));
    let ended = r#"{"target-version":"","enabled":false}"#;
    assert_eq!(rows.text(Bucket::Cluster, "downgrade").as_deref(), Some(ended));
}

#[test]
fn rows_that_cannot_be_read_refuse_to_load() {
    for (bucket, key, value) in [
        (Bucket::Members, "abc", "{"),
        (Bucket::Members, "abd", r#"{"id":2748,"peerURLs":["http://h:1"]}"#),
        (Bucket::Members, "xyz", r#"{"id":2748,"peerURLs":["http://h:1"]}"#),
        (Bucket::Members, "0abc", r#"{"id":2748,"peerURLs":["http://h:1"]}"#),
        (Bucket::MembersRemoved, "", "removed"),
        (Bucket::Cluster, "clusterVersion", "3"),
        (Bucket::Cluster, "downgrade", "{"),
    ] {
        let rows = Rows::default();
        rows.put(bucket, key, value);
        assert!(Members::load(&rows).is_err(), "{bucket:?} {key} {value}");
    }
}

#[test]
fn attributes_of_removed_members_are_ignored_and_of_unknown_ones_fatal() {
    let mut members = cluster([voter(1, "http://a:1"), voter(2, "http://b:1")]);
    apply(&mut members, Change::Remove(2)).unwrap();
    let mut batch = WriteBatch::default();
    assert_eq!(members.set_attributes(attributes(2, "b", &[]), &mut batch), Ok(()));
    assert_eq!(members.set_attributes(attributes(3, "c", &[]), &mut batch), Err(Error::UnknownMember(3)));
    let version = ClusterVersionSetRequest { ver: "latest".to_owned() };
    assert!(matches!(members.set_version(&version, Version::new(3, 7, 1), &mut batch), Err(Error::Version(_))));
    assert!(batch.is_empty());
}

#[test]
fn storage_version_is_told_from_the_first_release_that_has_it() {
    // C-36
    let (mut members, mut batch) = (Members::default(), WriteBatch::default());
    assert_eq!(members.storage_version(), None);
    for (version, told) in
        [("3.0.0", None), ("3.5.0", None), ("3.6.0", Some(6)), ("3.7.0", Some(7)), ("3.6.0", Some(6))]
    {
        let set = ClusterVersionSetRequest { ver: version.to_owned() };
        members.set_version(&set, Version::new(3, 7, 1), &mut batch).unwrap();
        assert_eq!(members.storage_version(), told.map(|minor| Version::new(3, minor, 0)), "{version}");
    }
}

#[test]
fn members_older_than_their_cluster_are_refused() {
    // C-34
    let (mut members, mut batch) = (Members::default(), WriteBatch::default());
    let set = |version: &str| ClusterVersionSetRequest { ver: version.to_owned() };
    let own = Version::new(3, 7, 1);
    assert_eq!(members.check_release(own), Ok(()), "not decided");
    members.set_version(&set("3.7.0"), own, &mut batch).unwrap();
    assert_eq!(members.check_release(own), Ok(()));
    let older = Version::new(3, 6, 9);
    let refusal = Error::TooOld { own: Version::new(3, 6, 0), cluster: Version::new(3, 7, 0) };
    assert_eq!(members.check_release(older), Err(refusal));
    let before = members.clone();
    assert!(matches!(members.set_version(&set("3.8.0"), own, &mut batch), Err(Error::TooOld { .. })));
    assert_eq!(members, before);
    // Also where a downgrade is under way: it begins with the cluster's version.
    members.set_downgrade(DowngradeInfoSetRequest { enabled: true, ver: "3.6.0".to_owned() }, &mut batch);
    assert!(members.check_release(older).is_err());
}

#[test]
fn lists_are_sorted_by_id() {
    // C-3, C-6, files.md 9.6
    let members = cluster([voter(1 << 63, "http://a:1"), voter(5, "http://b:1"), learner(7, "http://c:1")]);
    assert_eq!(members.list().iter().map(|m| m.id).collect::<Vec<_>>(), [5, 7, 1 << 63]);
    let learner =
        etcdserverpb::Member { id: 7, peer_ur_ls: strings(&["http://c:1"]), is_learner: true, ..Default::default() };
    assert_eq!(members.list()[1], learner);
    let expected =
        ConfState { voters: vec![5, 1 << 63], learners: vec![7], auto_leave: Some(false), ..Default::default() };
    assert_eq!(members.conf_state(), expected);
    assert!(!members.get(5).unwrap().is_started());
}

#[test]
fn a_snapshot_keeps_its_members() {
    let mut members = cluster([voter(1, "http://a:1")]);
    let view = members.clone();
    apply(&mut members, Change::Remove(1)).unwrap();
    assert!(view.get(1).is_some() && members.is_empty());
}

/// Random changes beside a naive model; after each, what would be loaded equals what is in memory.
#[test]
fn memory_and_rows_always_agree() {
    // C-14, C-29, H-30, H-31
    for seed in 0..20 {
        let mut rng = StdRng::seed_from_u64(seed);
        let rows = Rows::default();
        let mut members = Members::default();
        let mut removed = BTreeSet::new();
        for step in 0..300 {
            let id = rng.random_range(1..12);
            let url = format!("http://h{}:1", rng.random_range(0..8));
            let mut batch = WriteBatch::default();
            let known = members.get(id).cloned();
            match rng.random_range(0..6) {
                0 | 1 => {
                    let member = if rng.random() { voter(id, &url) } else { learner(id, &url) };
                    let free = members.iter().all(|m| m.peer_urls[0] != url);
                    let room = !member.is_learner || members.iter().filter(|m| m.is_learner).count() < 2;
                    let done = members.apply(Change::Add(member), 2, &mut batch).is_ok();
                    assert_eq!(done, known.is_none() && !removed.contains(&id) && free && room);
                }
                2 => {
                    let done = members.apply(Change::Promote(id), 2, &mut batch).is_ok();
                    assert_eq!(done, known.is_some_and(|m| m.is_learner));
                }
                3 => {
                    let free = members.iter().all(|m| m.id == id || m.peer_urls[0] != url);
                    let done = members.apply(update(id, &url), 2, &mut batch).is_ok();
                    assert_eq!(done, known.is_some() && free);
                }
                4 if rng.random_range(0..4) == 0 => {
                    let done = members.apply(Change::Remove(id), 2, &mut batch).is_ok();
                    assert_eq!(done, known.is_some());
                    if done {
                        removed.insert(id);
                    }
                }
                _ => {
                    let done = members.set_attributes(attributes(id, "n", &["http://c:1"]), &mut batch).is_ok();
                    assert_eq!(done, known.is_some() || removed.contains(&id));
                }
            }
            rows.commit(batch).unwrap();
            let loaded = Members::load(&rows).unwrap();
            assert!(loaded.iter().eq(members.iter()), "seed {seed} step {step}");
            assert!((0..12).all(|id| loaded.is_removed(id) == removed.contains(&id)), "seed {seed} step {step}");
        }
    }
}

// --- the beginning of a cluster

fn initial(text: &str) -> InitialCluster {
    InitialCluster::parse(text, |url| Ok(url.to_owned())).unwrap()
}

#[test]
fn the_first_entries_of_a_default_start_are_etcds() {
    // files.md 2.3, 2.5, 6.3
    let founding = initial("default=http://localhost:2380").found("etcd-cluster");
    assert_eq!(founding.cluster_id, 0xcdf8_1819_4e3a_8c32);
    assert_eq!(founding.member_id("default"), Some(0x8e9e_05c5_2164_694d));
    assert_eq!(founding.member_id("other"), None);
    let context = r#"{"id":10276657743932975437,"peerURLs":["http://localhost:2380"],"name":"default"}"#;
    let id = b"\xcd\xd2\x91\x8b\xd2\xb8\x81\xcf\x8e\x01";
    let change = [b"\x10\x00\x18", &id[..], b"\x22", &[context.len() as u8], context.as_bytes()].concat();
    let entry = [b"\x08\x01\x10\x01\x18\x01\x22", &[change.len() as u8][..], &change].concat();
    let entries: Vec<Vec<u8>> = founding.entries().iter().map(Message::encode_to_vec).collect();
    assert_eq!(entries, [entry]);
    assert_eq!(founding.hard_state().encode_to_vec(), b"\x08\x01\x10\x00\x18\x01");
}

#[test]
fn founders_join_in_order_of_their_ids_and_the_log_makes_the_membership() {
    // C-1, C-2, limits.md 17
    let text = "c=http://10.0.0.3:2380,a=http://10.0.0.1:2380,b=http://10.0.0.2:2380";
    let founding = initial(text).found("tkn");
    assert_eq!(founding.cluster_id, 0xb7d3_aeee_6f77_f03c);
    let names: Vec<&str> = founding.members.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c"]);
    let entries = founding.entries();
    assert!(entries.iter().zip(1..).all(|(entry, index)| entry.index == Some(index) && entry.term == Some(1)));
    assert_eq!(founding.hard_state().commit, Some(3));
    let mut members = Members::default();
    for entry in entries {
        let change = ConfChange::decode(entry.data.unwrap()).unwrap();
        apply(&mut members, Change::decode(&change).unwrap()).unwrap();
    }
    assert!(members.iter().eq(&founding.members));
    assert_eq!(members.conf_state().voters.len(), 3);
}

#[test]
fn a_name_may_have_several_urls() {
    let cluster = initial("b=http://h:3,a=http://h:2,a=http://h:1");
    assert_eq!(cluster.to_string(), "a=http://h:1,a=http://h:2,b=http://h:3");
    assert_eq!(cluster.validate("a", &strings(&["http://h:2", "http://h:1"]), str::to_owned), Ok(()));
    assert_eq!(cluster.found("t").members.iter().map(|m| m.peer_urls.len()).sum::<usize>(), 3);
}

#[test]
fn a_wrong_initial_cluster_says_what_is_wrong() {
    // limits.md 17, ctl.md (restore)
    let refuse = |text: &str, name: &str, advertised: &[&str]| {
        initial(text).validate(name, &strings(advertised), str::to_owned).unwrap_err().to_string()
    };
    assert_eq!(
        refuse("default=http://h:1", "zz", &["http://h:1"]),
        r#"couldn't find local name "zz" in the initial cluster configuration"#
    );
    assert_eq!(
        refuse("a=http://h:1,b=http://h:1", "a", &["http://h:1"]),
        "initial cluster a=http://h:1,b=http://h:1 has duplicate url"
    );
    assert_eq!(
        refuse("a=http://h:1", "a", &["http://i:1"]),
        "--initial-cluster has a=http://h:1 but missing from --initial-advertise-peer-urls=http://i:1 \
         (resolved urls: \"http://i:1\" != \"http://h:1\")"
    );
    assert_eq!(
        refuse("a=http://h:1", "a", &["http://h:1", "http://i:1"]),
        "--initial-advertise-peer-urls has http://i:1 but missing from --initial-cluster=a=http://h:1,a=http://i:1"
    );
    assert_eq!(
        refuse("a=http://h:1,a=http://j:1", "a", &["http://h:1"]),
        "--initial-cluster has a=http://j:1 but missing from --initial-advertise-peer-urls=http://h:1 \
         (len([\"http://h:1\"]) != len([\"http://h:1\" \"http://j:1\"]))"
    );
    let parse = |text| InitialCluster::parse(text, |url| Err(format!("bad {url:?}")));
    assert_eq!(parse("a").unwrap_err().to_string(), r#"bad """#);
    assert_eq!(initial("").validate("a", &[], str::to_owned), Err(bootstrap::Error::UnknownName("a".to_owned())));
}

#[test]
fn the_first_requests_of_a_member_are_etcds() {
    // files.md 6.2, C-5, C-32
    let publish = bootstrap::publish_request(1, "n", &strings(&["http://c:1"]));
    assert_eq!(publish.encode_to_vec(), b"\xaa\x51\x13\x08\x01\x12\x0f\x0a\x01n\x12\x0ahttp://c:1");
    let version = bootstrap::cluster_version_request(Version::new(3, 7, 1));
    assert_eq!(version.encode_to_vec(), b"\xa2\x51\x07\x0a\x053.7.0");
}

#[test]
fn only_a_cluster_of_a_fitting_version_is_joined() {
    // limits.md 17, C-34
    let own = Version::new(3, 7, 1);
    let check = |told: &[Version], downgrading| bootstrap::check_versions(own, told, downgrading).is_ok();
    assert!(check(&[Version::new(3, 7, 0), Version::new(3, 4, 0)], false));
    assert!(!check(&[], false));
    assert!(!check(&[Version::new(3, 8, 0)], false));
    assert!(!check(&[Version::new(2, 3, 0)], false));
    assert!(check(&[Version::new(3, 8, 0)], true));
    assert!(!check(&[Version::new(3, 7, 0)], true));
}

#[test]
fn a_member_alone_has_a_vote_before_the_others_go() {
    // limits.md 17 (--force-new-cluster)
    let members = cluster([voter(1, "http://a:1"), voter(2, "http://b:1"), learner(3, "http://c:1")]);
    let of = |id| bootstrap::alone(&members, Member { id, ..Member::default() });
    assert_eq!(of(1), [Change::Remove(2), Change::Remove(3)]);
    assert_eq!(of(3), [Change::Promote(3), Change::Remove(1), Change::Remove(2)]);
    assert!(matches!(&of(4)[..], [Change::Add(_), Change::Remove(1), Change::Remove(2), Change::Remove(3)]));
}

#[test]
fn a_joining_member_is_found_by_its_urls_as_resolved() {
    // files.md 9.1
    let running = [voter(7, "http://10.0.0.1:1"), voter(9, "http://10.0.0.2:1")];
    let list = initial("a=http://one:1,b=http://10.0.0.2:1");
    let resolve = |url: &str| url.replace("one", "10.0.0.1");
    assert_eq!(list.join("a", &running, resolve), Ok(7));
    assert_eq!(list.join("b", &running, resolve), Ok(9));
    assert!(matches!(list.join("a", &running, str::to_owned), Err(bootstrap::Error::NoMatch { .. })));
    assert_eq!(list.join("a", &running[..1], resolve), Err(bootstrap::Error::MemberCount));
}
