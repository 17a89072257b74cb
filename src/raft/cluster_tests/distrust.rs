//! What a member must not believe, take or acknowledge: what nobody could apply, and words of logs that are not what they were.

use super::*;

#[test]
fn what_no_member_could_apply_is_not_taken() {
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    let term = cluster.nodes[&leader].core.reading().term;
    let proposal = raftpb::Message {
        r#type: Some(raftpb::MessageType::MsgProp.into()),
        to: Some(leader),
        from: Some(follower),
        entries: vec![raftpb::Entry { data: Some(Bytes::from_static(b"\xff\xff")), ..Default::default() }],
        ..Default::default()
    };
    assert!(cluster.node(leader).core.step(proposal).unwrap_err().contains("no member can apply"));
    cluster.ticks(5);
    cluster.agree();
    assert_eq!(cluster.nodes[&leader].core.reading().term, term);
}

/// What the process ends with when `doing` is done.
fn ending(doing: impl FnOnce()) -> String {
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(doing)).expect_err("it must end");
    panic.downcast_ref::<String>().expect("a text").clone()
}

#[test]
fn a_log_that_lost_its_end_ends_the_process_at_its_leaders_word_alone() {
    let (mut cluster, first) = Cluster::led(3);
    let second = other(&cluster, first);
    cluster.node(first).core.transfer(second);
    cluster.ticks(2);
    let (leader, follower) = (cluster.until_led(), first);
    assert_eq!(leader, second);
    let now = cluster.nodes[&leader].core.reading();
    let heartbeat = |to, from, term, commit| raftpb::Message {
        r#type: Some(raftpb::MessageType::MsgHeartbeat.into()),
        to: Some(to),
        from: Some(from),
        term: Some(term),
        commit: Some(commit),
        ..Default::default()
    };
    // Not of a leader that is none any more, nor of one beside this member.
    cluster.node(follower).core.step(heartbeat(follower, leader, now.term - 1, 1_000_000)).unwrap();
    cluster.node(leader).core.step(heartbeat(leader, follower, now.term, 1_000_000)).unwrap();
    cluster.node(follower).core.step(heartbeat(follower, leader, now.term, now.last_index)).unwrap();
    cluster.ticks(5);
    for term in [now.term, now.term + 1] {
        let beyond = heartbeat(follower, leader, term, now.last_index + 1);
        let text = ending(|| _ = cluster.node(follower).core.step(beyond));
        assert!(text.contains("was its end lost") && text.contains("add it as a new one"), "{text}");
        assert!(text.contains(&format!("entry {} ", now.last_index + 1)), "{text}");
    }
}

#[test]
fn a_wiped_member_gets_no_log_again_under_its_old_id() {
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    for i in 0..5 {
        cluster.propose(leader, &format!("k{i}"));
        cluster.settle();
    }
    cluster.ticks(2);
    // As one that joins a running cluster: it learns from the log who is in.
    cluster.nodes.insert(follower, node(follower, &[]));
    cluster.node(leader).core.unreachable(follower);
    // Its leader sends before the next heartbeat, and hears how little is there. Given the log from there on, this
    // member would go on voting although nobody knows for whom it has voted before.
    cluster.propose(leader, "more");
    cluster.settle();
    assert!(cluster.nodes[&follower].disk.is_empty());
    let text = ending(|| cluster.ticks(2));
    assert!(text.contains("was its end lost"), "{text}");
}

#[test]
fn nothing_beyond_a_log_is_taken_for_a_part_of_it() {
    let (mut cluster, leader) = Cluster::led(3);
    let follower = other(&cluster, leader);
    let now = cluster.nodes[&leader].core.reading();
    let append = raftpb::Message {
        r#type: Some(raftpb::MessageType::MsgApp.into()),
        to: Some(follower),
        from: Some(leader),
        term: Some(now.term),
        index: Some(500),
        ..Default::default()
    };
    let entry = |index, term| raftpb::Entry { index: Some(index), term: Some(term), ..Default::default() };
    let behind_last = raftpb::Message { index: Some(now.last_index), log_term: Some(now.term), ..append.clone() };
    for bad in [
        append.clone(),
        raftpb::Message { commit: Some(400), ..append.clone() },
        raftpb::Message { entries: vec![entry(501, now.term)], commit: Some(501), ..append.clone() },
        // Nothing is there as well.
        raftpb::Message { entries: vec![entry(now.last_index + 1, 0)], commit: Some(400), ..behind_last },
    ] {
        cluster.node(follower).core.step(bad).unwrap_err();
    }
    // A term makes it a question whether that entry is here. It is not.
    cluster.node(follower).core.step(raftpb::Message { log_term: Some(now.term), ..append }).unwrap();
    cluster.work(follower);
    let answer = cluster.network.pop().unwrap();
    assert!(answer.reject() && answer.reject_hint() == now.last_index);
    let id = cluster.propose(leader, "a");
    cluster.ticks(2);
    assert_eq!(cluster.outcome(id), Some(Ok(Response::Done)));
    assert!(cluster.nodes.values().all(|n| n.core.reading().commit == now.last_index + 1));
    cluster.agree();
}

#[test]
fn an_answer_to_what_was_never_sent_acknowledges_nothing() {
    let (mut cluster, leader) = Cluster::led(3);
    let followers: Vec<u64> = cluster.nodes.keys().copied().filter(|id| *id != leader).collect();
    let now = cluster.nodes[&leader].core.reading();
    cluster.isolate(leader);
    for index in [now.last_index + 1, 100, u64::MAX] {
        for from in [followers[0], followers[1], leader] {
            let accepted = raftpb::Message {
                r#type: Some(raftpb::MessageType::MsgAppResp.into()),
                to: Some(leader),
                from: Some(from),
                term: Some(now.term),
                index: Some(index),
                ..Default::default()
            };
            cluster.node(leader).core.step(accepted).unwrap_err();
        }
    }
    let id = cluster.propose(leader, "alone");
    cluster.settle();
    assert_eq!(cluster.outcome(id), None);
    assert_eq!(cluster.nodes[&leader].core.reading().commit, now.commit);
}
