//! The Cluster service, leadership moves and downgrades by statement: codes and texts as clients read them.

use std::time::{Duration, Instant};

use actd::pb::etcdserverpb::{
    AlarmRequest, DowngradeRequest, HashKvRequest, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest,
    LeaseTimeToLiveRequest, MemberAddRequest, MemberListRequest, MemberPromoteRequest, MemberRemoveRequest,
    MemberUpdateRequest, MoveLeaderRequest, PutRequest, RangeRequest, StatusRequest, TxnRequest, WatchCreateRequest,
    WatchRequest, downgrade_request::DowngradeAction, watch_request::RequestUnion,
};
use actd::peer::client;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Status};

use crate::{
    common::Client,
    members::{Cluster, Member, PATIENCE},
    run,
};

fn add(urls: &[&str], is_learner: bool) -> MemberAddRequest {
    MemberAddRequest { peer_ur_ls: urls.iter().map(|url| (*url).to_owned()).collect(), is_learner }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, text: &str) {
    let status = answer.expect_err(text);
    assert_eq!((status.code(), status.message()), (code, text));
}

/// It leaves with code Unknown (G-2).
const NOT_STARTED: &str = "etcdserver: re-configuration failed due to not enough started members";

#[test]
fn changes_are_checked_by_the_rules_of_one_member() {
    run(|| async {
        let cluster = Cluster::start(1, &[]).await;
        let Client { cluster: mut members, mut maintenance, .. } = cluster.members[0].client();
        let own = &cluster.members[0];
        // C-7
        for urls in [&[][..], &["x"], &["http://127.0.0.1"], &["http://127.0.0.1:1/path"], &["ftp://127.0.0.1:1"]] {
            let text = "etcdserver: given member URLs are invalid";
            refused(members.member_add(add(urls, false)).await, Code::InvalidArgument, text);
        }
        // C-8
        let taken = add(&[&own.peer_url()], false);
        refused(members.member_add(taken).await, Code::FailedPrecondition, "etcdserver: Peer URLs already exists");
        // C-14, C-15, C-18, C-21
        let not_found = "etcdserver: member not found";
        refused(members.member_remove(MemberRemoveRequest { id: 7 }).await, Code::NotFound, not_found);
        let only = MemberRemoveRequest { id: own.id };
        refused(members.member_remove(only).await, Code::Unknown, NOT_STARTED);
        let update = |id, url: &str| MemberUpdateRequest { id, peer_ur_ls: vec![url.to_owned()] };
        refused(members.member_update(update(7, "http://127.0.0.1:1")).await, Code::NotFound, not_found);
        refused(members.member_promote(MemberPromoteRequest { id: 7 }).await, Code::NotFound, not_found);
        let voter = MemberPromoteRequest { id: own.id };
        let text = "etcdserver: can only promote a learner member";
        refused(members.member_promote(voter).await, Code::FailedPrecondition, text);
        // C-4, C-5, C-6, C-11
        let added = members.member_add(add(&["http://127.0.0.1:7001"], true)).await.expect("a learner").into_inner();
        assert_eq!(added.header.as_ref().map(|h| h.revision), Some(0));
        let learner = added.member.expect("the member");
        assert!(learner.is_learner && learner.name.is_empty() && learner.client_ur_ls.is_empty());
        assert_eq!(added.members.len(), 2);
        let second = add(&["http://127.0.0.1:7002"], true);
        let text = "etcdserver: too many learner members in cluster";
        refused(members.member_add(second).await, Code::FailedPrecondition, text);
        let text = "etcdserver: can only promote a learner member which is in sync with leader";
        refused(members.member_promote(MemberPromoteRequest { id: learner.id }).await, Code::FailedPrecondition, text);
        // C-18: only the URLs change.
        let changed = members.member_update(update(learner.id, "http://127.0.0.1:7003")).await.expect("an update");
        let now = changed.into_inner().members.into_iter().find(|m| m.id == learner.id).expect("it is there");
        assert_eq!((now.peer_ur_ls, now.is_learner), (vec!["http://127.0.0.1:7003".to_owned()], true));
        let text = "etcdserver: Peer URLs already exists";
        refused(members.member_update(update(learner.id, &own.peer_url())).await, Code::FailedPrecondition, text);
        // M-38
        let bad = "etcdserver: bad leader transferee";
        for target_id in [7, learner.id] {
            let moved = maintenance.move_leader(MoveLeaderRequest { target_id }).await;
            refused(moved, Code::FailedPrecondition, bad);
        }
        maintenance.move_leader(MoveLeaderRequest { target_id: own.id }).await.expect("it leads already");
        // C-14: a learner goes without checks, and its id is gone for ever.
        members.member_remove(MemberRemoveRequest { id: learner.id }).await.expect("a learner goes");
        refused(members.member_remove(MemberRemoveRequest { id: learner.id }).await, Code::NotFound, not_found);
        // The same URL again is another member (C-1); the second voter is free (C-9).
        let again = members.member_add(add(&["http://127.0.0.1:7003"], false)).await.expect("a voter").into_inner();
        assert_ne!(again.member.expect("the member").id, learner.id);
    });
}

#[test]
fn downgrades_follow_their_rules() {
    // C-37 to C-43
    run(|| async {
        let mut cluster = Cluster::start(1, &[]).await;
        let mut client = cluster.members[0].client().maintenance;
        let ask = |action: i32, version: &str| DowngradeRequest { action, version: version.to_owned() };
        let [validate, enable, cancel] =
            [DowngradeAction::Validate, DowngradeAction::Enable, DowngradeAction::Cancel].map(i32::from);
        refused(client.downgrade(ask(9, "3.6")).await, Code::Unknown, "etcdserver: unknown method");
        let text = "etcdserver: wrong downgrade target version format";
        for version in ["", "x", "3", "3.6.1.2"] {
            refused(client.downgrade(ask(validate, version)).await, Code::InvalidArgument, text);
        }
        let text = "etcdserver: invalid downgrade target version";
        for version in ["3.7.0", "3.5", "3.8", "2.6"] {
            refused(client.downgrade(ask(enable, version)).await, Code::InvalidArgument, text);
        }
        let valid = client.downgrade(ask(validate, "3.6.9")).await.expect("one minor lower").into_inner();
        assert_eq!(valid.version, "3.7");
        client.downgrade(ask(cancel, "")).await.expect("also without a job");
        assert_eq!(client.status(StatusRequest {}).await.expect("a status").into_inner().storage_version, "3.7.0");
        let before = client.hash_kv(HashKvRequest { revision: 0 }).await.expect("a hash").into_inner();
        client.downgrade(ask(enable, "3.6")).await.expect("one minor lower");
        let text = "etcdserver: cluster has a downgrade job in progress";
        // The cluster's version goes down at the monitor's next look, and then the target is wrong.
        let again = client.downgrade(ask(enable, "3.6.0")).await.expect_err("a job is on");
        assert!(
            again.message() == text || again.message() == "etcdserver: invalid downgrade target version",
            "{again}"
        );
        let info = client.status(StatusRequest {}).await.expect("a status").into_inner().downgrade_info;
        let info = info.expect("it is told");
        assert!(info.enabled);
        assert_eq!(info.target_version, "3.6.0");
        // The storage's version follows the cluster's (C-36), and rows are hashed as before.
        let deadline = Instant::now() + PATIENCE;
        while client.status(StatusRequest {}).await.expect("a status").into_inner().storage_version != "3.6.0" {
            assert!(Instant::now() < deadline, "the version does not come down");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let after = client.hash_kv(HashKvRequest { revision: 0 }).await.expect("a hash").into_inner();
        assert_eq!((after.hash, after.hash_revision), (before.hash, before.hash_revision));
        // It survives a restart, and is called off.
        cluster.members[0].kill();
        cluster.restart(0);
        cluster.until_led().await;
        let info = client.status(StatusRequest {}).await.expect("a status").into_inner().downgrade_info;
        assert!(info.expect("it is told").enabled);
        client.downgrade(ask(cancel, "")).await.expect("called off");
        let info = client.status(StatusRequest {}).await.expect("a status").into_inner().downgrade_info;
        assert!(!info.expect("it is told").enabled);
    });
}

#[test]
fn voters_are_added_and_removed_only_where_it_is_safe() {
    // C-9, C-10, C-15
    run(|| async {
        let cluster = Cluster::start(2, &[]).await;
        let mut members = cluster.members[0].client().cluster;
        let early = members.member_add(add(&["http://127.0.0.1:7001"], false)).await;
        refused(early, Code::Unavailable, "etcdserver: unhealthy cluster");
        let deadline = Instant::now() + PATIENCE;
        let third = loop {
            match members.member_add(add(&["http://127.0.0.1:7001"], false)).await {
                Ok(added) => break added.into_inner().member.expect("the member"),
                Err(e) => assert!(Instant::now() < deadline, "{e}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        // Three voters, one of which never started.
        let fourth = members.member_add(add(&["http://127.0.0.1:7002"], false)).await;
        refused(fourth, Code::Unknown, NOT_STARTED);
        let started = MemberRemoveRequest { id: cluster.members[1].id };
        refused(members.member_remove(started).await, Code::Unknown, NOT_STARTED);
        members.member_remove(MemberRemoveRequest { id: third.id }).await.expect("it never started");
    });
}

#[test]
fn promotions_asked_of_any_member_reach_the_leader() {
    // C-22; http.md 4.3: also where another member asks.
    run(|| async {
        let cluster = Cluster::start(2, &[]).await;
        cluster.until_led().await;
        let patience = Duration::from_secs(5);
        for member in &cluster.members {
            let url = member.peer_url();
            let refused = |id| client::promote(&url, id, None, patience);
            let text = |e: client::Error| match e {
                client::Error::Refused { status, text, .. } => (status, text.trim().to_owned()),
                e => panic!("{e}"),
            };
            let unknown = text(refused(5).await.expect_err("nobody"));
            assert_eq!(unknown, (404, "membership: ID not found".to_owned()));
            let voter = text(refused(member.id).await.expect_err("a voter"));
            assert_eq!(voter, (412, "membership: can only promote a learner member".to_owned()));
        }
    });
}

#[test]
fn learners_answer_little_until_they_are_promoted() {
    // C-20, C-22, C-25, C-26, KV-26, KV-39, W-53
    run(|| async {
        let mut cluster = Cluster::start(2, &[]).await;
        let leader = cluster.until_led().await;
        let mut voter = cluster.members[leader].client();
        voter.kv.put(PutRequest { key: "k".into(), value: "v".into(), ..Default::default() }).await.expect("a put");
        let new = cluster.add(leader, true).await;
        let Client { mut kv, mut lease, mut watch, cluster: mut members, mut maintenance, .. } =
            cluster.members[new].client();
        let deadline = Instant::now() + PATIENCE;
        let range = RangeRequest { key: "k".into(), serializable: true, ..Default::default() };
        while kv.range(range.clone()).await.is_ok_and(|answer| answer.into_inner().kvs.is_empty())
            || maintenance.status(StatusRequest {}).await.is_err()
        {
            assert!(Instant::now() < deadline, "the learner does not catch up");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(maintenance.status(StatusRequest {}).await.expect("a status").into_inner().is_learner);
        let text = "etcdserver: rpc not supported for learner";
        let linearizable = RangeRequest { serializable: false, ..range.clone() };
        refused(kv.range(linearizable.clone()).await, Code::FailedPrecondition, text);
        refused(kv.put(PutRequest { key: "k".into(), ..Default::default() }).await, Code::FailedPrecondition, text);
        refused(kv.txn(TxnRequest::default()).await, Code::FailedPrecondition, text);
        refused(kv.range_stream(range.clone()).await.map(drop), Code::FailedPrecondition, text);
        let watched = watch.watch(tokio_stream::pending::<WatchRequest>()).await.map(drop);
        refused(watched, Code::FailedPrecondition, text);
        refused(lease.lease_grant(LeaseGrantRequest { ttl: 9, id: 0 }).await, Code::FailedPrecondition, text);
        let list = MemberListRequest { linearizable: false };
        refused(members.member_list(list).await, Code::FailedPrecondition, text);
        refused(maintenance.hash_kv(HashKvRequest { revision: 0 }).await, Code::FailedPrecondition, text);
        refused(maintenance.alarm(AlarmRequest::default()).await, Code::FailedPrecondition, text);
        // Asked of a follower, which asks the leader.
        let follower = 1 - leader;
        cluster.promote(follower, new, Some("abc.1")).await;
        kv.range(linearizable).await.expect("at once");
        assert!(!maintenance.status(StatusRequest {}).await.expect("a status").into_inner().is_learner);
        cluster.until_equal().await;
    });
}

#[test]
fn removed_members_end_and_do_not_start_again() {
    // C-16, C-17
    run(|| async {
        let mut cluster = Cluster::start(4, &[]).await;
        for case in ["a follower", "a follower that is down", "the leader"] {
            println!("{case} is removed");
            let leader = cluster.until_led().await;
            let follower = (leader + 1) % cluster.members.len();
            let (by, which) = if case == "the leader" { (follower, leader) } else { (leader, follower) };
            if case == "a follower that is down" {
                cluster.members[which].kill();
            }
            let ran = cluster.members[which].is_running();
            let mut removed = cluster.remove(by, which).await;
            let said = |member: &Member| {
                let log = member.log();
                [
                    r#""msg":"server error","error":"the member has been permanently removed from the cluster""#,
                    r#""msg":"data-dir used by this member must be removed""#,
                ]
                .map(|words| log.lines().filter(|line| line.contains(words)).count())
            };
            let [why, what] = said(&removed);
            assert_eq!((why, what), (usize::from(ran), usize::from(ran)), "{}", removed.log());
            // Also where the others have to tell it.
            removed.start();
            assert_eq!(removed.until_ended().await, Some(0), "it is no failure, and no supervisor is to try again");
            let [why, what] = said(&removed);
            assert_eq!((why, what), (usize::from(ran) + 1, usize::from(ran) + 1), "{}", removed.log());
            assert!(!removed.log().contains(r#""level":"fatal""#), "{}", removed.log());
            cluster.until_led().await;
            let term = cluster.term().await;
            let put = PutRequest { key: "k".into(), ..Default::default() };
            cluster.members[0].client().kv.put(put).await.expect("the others go on");
            cluster.until_equal().await;
            assert_eq!(cluster.term().await, term, "nobody is disturbed");
        }
    });
}

#[test]
fn members_without_quorum_say_so() {
    // D-12, D-16, C-3, G-8, KV-26, KV-31, W-54
    run(|| async {
        let mut cluster = Cluster::start(3, &[]).await;
        let leader = cluster.until_led().await;
        for i in (0..3).filter(|i| *i != leader) {
            cluster.members[i].kill();
        }
        let Client { mut kv, cluster: mut members, mut watch, .. } = cluster.members[leader].client();
        let deadline = Instant::now() + PATIENCE;
        while cluster.members[leader].status().await.is_none_or(|status| status.leader != 0) {
            assert!(Instant::now() < deadline, "it leads nobody and does not notice");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let mut impatient = Request::new(RangeRequest { key: "k".into(), ..Default::default() });
        impatient.metadata_mut().insert("hasleader", "true".parse().expect("a value"));
        refused(kv.range(impatient).await, Code::Unavailable, "etcdserver: no leader");
        let range = RangeRequest { key: "k".into(), ..Default::default() };
        refused(kv.range(range.clone()).await, Code::Unavailable, "etcdserver: request timed out");
        let put = PutRequest { key: "k".into(), ..Default::default() };
        refused(kv.put(put).await, Code::DeadlineExceeded, "context deadline exceeded");
        // Who knows whether there is such a member by now?
        let update = MemberUpdateRequest { id: 7, peer_ur_ls: vec!["http://127.0.0.1:1".to_owned()] };
        refused(members.member_update(update).await, Code::DeadlineExceeded, "context deadline exceeded");
        refused(kv.range_stream(range.clone()).await.map(drop), Code::Unavailable, "etcdserver: request timed out");
        let serializable = RangeRequest { serializable: true, ..range };
        kv.range(serializable.clone()).await.expect("a serializable read");
        let mut parts = kv.range_stream(serializable).await.expect("a serializable stream").into_inner();
        assert!(parts.message().await.expect("a part").is_some());
        // A watch begins with what is known here.
        let create = WatchCreateRequest { key: "k".into(), ..Default::default() };
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        let requests = tokio_stream::once(create).chain(tokio_stream::pending());
        let mut watching = watch.watch(requests).await.expect("a stream").into_inner();
        assert!(watching.message().await.expect("a response").expect("created").created);
        let local = MemberListRequest { linearizable: false };
        assert_eq!(members.member_list(local).await.expect("a local list").into_inner().members.len(), 3);
        // With one more it goes on.
        let other = (leader + 1) % 3;
        cluster.restart(other);
        let range = RangeRequest { key: "k".into(), ..Default::default() };
        while kv.range(range.clone()).await.is_err() {
            assert!(Instant::now() < deadline, "no service with two of three");
        }
    });
}

#[test]
fn streams_that_ask_for_a_leader_end_when_it_is_gone_for_long() {
    // W-47, W-48, W-49
    run(|| async {
        let mut cluster = Cluster::start(3, &[]).await;
        let leader = cluster.until_led().await;
        let Client { mut watch, mut lease, .. } = cluster.members[leader].client();
        // Requests that never end, and the metadata.
        fn asking<T: Send + 'static>(first: T, leader: bool) -> Request<impl Stream<Item = T> + Send + 'static> {
            let mut request = Request::new(tokio_stream::once(first).chain(tokio_stream::pending()));
            if leader {
                request.metadata_mut().insert("hasleader", "true".parse().expect("a value"));
            }
            request
        }
        let create = || WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(WatchCreateRequest {
                key: "k".into(),
                ..Default::default()
            })),
        };
        let grant = lease.lease_grant(LeaseGrantRequest { ttl: 600, id: 7 }).await.expect("a lease").into_inner();
        let renew = LeaseKeepAliveRequest { id: grant.id };
        let mut asked = watch.watch(asking(create(), true)).await.expect("a stream").into_inner();
        let mut patient = watch.watch(asking(create(), false)).await.expect("a stream").into_inner();
        let mut renewals = lease.lease_keep_alive(asking(renew, true)).await.expect("a stream").into_inner();
        asked.message().await.expect("a response").expect("created");
        patient.message().await.expect("a response").expect("created");
        renewals.message().await.expect("a response").expect("renewed");

        let others: Vec<usize> = (0..3).filter(|i| *i != leader).collect();
        others.iter().for_each(|i| cluster.members[*i].kill());
        let killed = Instant::now();
        for end in [asked.message().await.map(|_| ()), renewals.message().await.map(|_| ())] {
            refused(end, Code::Unavailable, "etcdserver: no leader");
        }
        assert!(killed.elapsed() < PATIENCE, "they ended after {:?}", killed.elapsed());
        refused(watch.watch(asking(create(), true)).await, Code::Unavailable, "etcdserver: no leader");
        // The other stream goes on when there is a leader again.
        cluster.restart(others[0]);
        let put = PutRequest { key: "k".into(), ..Default::default() };
        let mut kv = cluster.members[leader].client().kv;
        while kv.put(put.clone()).await.is_err() {
            assert!(killed.elapsed() < PATIENCE, "no service with two of three");
        }
        let event = tokio::time::timeout(PATIENCE, patient.message()).await.expect("in time").expect("no end");
        assert_eq!(event.expect("a response").events.len(), 1);
    });
}

#[test]
fn removed_members_stop_and_stay_out() {
    // C-16, C-17
    run(|| async {
        let mut cluster = Cluster::start(3, &[]).await;
        let leader = cluster.until_led().await;
        let id = cluster.members[leader].id;
        let asked = (leader + 1) % 3;
        let deadline = Instant::now() + PATIENCE;
        while let Err(e) = cluster.members[asked].client().cluster.member_remove(MemberRemoveRequest { id }).await {
            assert!(e.message().contains("unhealthy") && Instant::now() < deadline, "{e}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        cluster.members[leader].until_ended().await;
        cluster.restart(leader);
        // It refuses to start on its old data.
        cluster.members[leader].until_ended().await;
        cluster.members.remove(leader);
        cluster.until_led().await;
        let term = cluster.term().await;
        let mut kv = cluster.members[0].client().kv;
        kv.put(PutRequest { key: "k".into(), ..Default::default() }).await.expect("two of two");
        cluster.until_equal().await;
        assert_eq!(cluster.term().await, term);
    });
}

#[test]
fn what_one_member_was_told_holds_on_all() {
    // L-6, W-33, KV-73
    run(|| async {
        let cluster = Cluster::start(3, &[]).await;
        cluster.until_led().await;
        let mut clients: Vec<Client> = cluster.members.iter().map(|member| member.client()).collect();
        let mut watching = Vec::new();
        for client in &mut clients {
            let create = WatchCreateRequest { key: "k".into(), range_end: "l".into(), ..Default::default() };
            let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
            let requests = tokio_stream::once(create).chain(tokio_stream::pending());
            let mut stream = client.watch.watch(requests).await.expect("a stream").into_inner();
            assert!(stream.message().await.expect("a response").expect("created").created);
            watching.push(stream);
        }
        const ROUNDS: usize = 30;
        for round in 0..ROUNDS {
            // Granted by one, used at once on the next, renewed on the one after.
            let at = |n: usize| (round + n) % 3;
            let grant = LeaseGrantRequest { ttl: 600, id: 0 };
            let id = clients[at(0)].lease.lease_grant(grant).await.expect("a lease").into_inner().id;
            let put = PutRequest { key: format!("k{}", round % 4).into(), lease: id, ..Default::default() };
            clients[at(1)].kv.put(put).await.expect("a put with a lease just granted");
            let renew = tokio_stream::once(LeaseKeepAliveRequest { id });
            let mut renewed = clients[at(2)].lease.lease_keep_alive(renew).await.expect("a stream").into_inner();
            assert_eq!(renewed.message().await.expect("no error").expect("an answer").ttl, 600);
            let ask = LeaseTimeToLiveRequest { id, keys: true };
            let time = clients[at(1)].lease.lease_time_to_live(ask).await.expect("an answer").into_inner();
            assert_eq!((time.granted_ttl, time.keys.len()), (600, 1));
            if round % 5 == 4 {
                clients[at(2)].lease.lease_revoke(LeaseRevokeRequest { id }).await.expect("revoked");
            }
        }
        let mut seen = Vec::new();
        for stream in &mut watching {
            let mut events = Vec::new();
            while events.len() < ROUNDS + ROUNDS / 5 {
                let next = tokio::time::timeout(PATIENCE, stream.message()).await.expect("in time");
                events.extend(next.expect("no error").expect("the stream goes on").events);
            }
            seen.push(events);
        }
        assert!(seen[1] == seen[0] && seen[2] == seen[0]);
        cluster.until_equal().await;
    });
}
