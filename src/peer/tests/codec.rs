//! The framings, against bytes written by hand and against hostile input.

use bytes::{Bytes, BytesMut};
use prost::Message as _;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

use crate::{
    pb::raftpb::{Entry, Message, MessageType},
    peer::codec::{Decoder, Encoder, Error, Kind, SnapshotHead, message_from, put_with_length},
};

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn entry(term: u64, index: u64, data: &'static [u8]) -> Entry {
    Entry { term: Some(term), index: Some(index), data: Some(Bytes::from_static(data)), ..Entry::default() }
}

/// From 1 to 2.
fn append(term: u64, log_term: u64, index: u64, entries: Vec<Entry>, commit: u64) -> Message {
    Message {
        r#type: Some(MessageType::MsgApp as i32),
        to: Some(2),
        from: Some(1),
        term: Some(term),
        log_term: Some(log_term),
        index: Some(index),
        entries,
        commit: Some(commit),
        ..Message::default()
    }
}

fn encode(kind: Kind, messages: &[Message]) -> Vec<u8> {
    let (mut encoder, mut out) = (Encoder::new(kind), BytesMut::new());
    for message in messages {
        encoder.message(message, &mut out);
    }
    out.to_vec()
}

fn decode(kind: Kind, bytes: &[u8]) -> Result<Vec<Message>, Error> {
    let mut decoder = Decoder::new(kind, 1, 2);
    decoder.push(bytes);
    let mut found = Vec::new();
    while let Some(message) = decoder.next()? {
        found.push(message);
    }
    Ok(found)
}

#[test]
fn an_append_stream_tells_only_what_its_position_does_not() {
    let messages = [
        append(5, 4, 9, vec![entry(5, 10, b"x")], 9),
        append(5, 5, 10, vec![entry(5, 11, b"yz")], 10),
        append(5, 5, 11, vec![], 11),
        // Not where the stream is: told whole, and the stream goes on from there.
        append(5, 5, 7, vec![], 11),
        append(5, 5, 7, vec![entry(5, 8, b"")], 11),
        // The same place in another term.
        append(6, 5, 8, vec![], 11),
        append(6, 6, 8, vec![], 12),
    ];
    let bytes = hex(concat!(
        "02 0000000000000017 0803 1002 1801 2005 2804 3009 3a07 1005 180a 220178 4009",
        "01 0000000000000001 0000000000000008 1005 180b 2202797a 000000000000000a",
        "01 0000000000000000 000000000000000b",
        "02 000000000000000e 0803 1002 1801 2005 2805 3007 400b",
        "01 0000000000000001 0000000000000006 1005 1808 2200 000000000000000b",
        "02 000000000000000e 0803 1002 1801 2006 2805 3008 400b",
        "02 000000000000000e 0803 1002 1801 2006 2806 3008 400c",
    ));
    // The last one: the position's term is 6 now, so it is told short.
    let short = hex("01 0000000000000000 000000000000000c");
    let bytes = [&bytes[..bytes.len() - 23], &short].concat();
    assert_eq!(encode(Kind::Append, &messages), bytes);
    assert_eq!(decode(Kind::Append, &bytes).unwrap(), messages);
}

#[test]
fn an_append_at_the_beginning_of_a_stream_may_be_short() {
    // A fresh stream is at term 0, index 0.
    let bytes = hex("01 0000000000000001 0000000000000002 1801 0000000000000003");
    let found = decode(Kind::Append, &bytes).unwrap();
    assert_eq!(found, [append(0, 0, 0, vec![Entry { index: Some(1), ..Entry::default() }], 3)]);
}

#[test]
fn a_message_stream_is_messages_behind_their_lengths() {
    let vote = Message {
        r#type: Some(MessageType::MsgVote as i32),
        to: Some(2),
        from: Some(1),
        term: Some(3),
        context: Some(Bytes::from_static(b"c")),
        ..Message::default()
    };
    let bytes = hex("000000000000000b 0805 1002 1801 2003 620163");
    assert_eq!(encode(Kind::Message, std::slice::from_ref(&vote)), bytes);
    assert_eq!(decode(Kind::Message, &bytes).unwrap(), [vote]);
}

#[test]
fn link_heartbeats_are_written_as_this_version_does_and_read_from_all() {
    let mut out = BytesMut::new();
    Encoder::new(Kind::Append).link_heartbeat(&mut out);
    assert_eq!(out, hex("00"));
    out.clear();
    Encoder::new(Kind::Message).link_heartbeat(&mut out);
    assert_eq!(out, hex("0000000000000002 0808"));
    for theirs in [
        "0000000000000002 0808",
        "0000000000000014 0808100018002000280030004000500058006800",
        "000000000000001e 08081000180020002800300040004a0a12080a0228001000180050005800",
    ] {
        assert_eq!(decode(Kind::Message, &hex(theirs)).unwrap(), [], "{theirs}");
    }
    assert_eq!(decode(Kind::Append, &[0; 64]).unwrap(), []);
    // A heartbeat of the leader is none.
    let real =
        Message { r#type: Some(MessageType::MsgHeartbeat as i32), to: Some(2), from: Some(1), ..Message::default() };
    assert_eq!(decode(Kind::Message, &encode(Kind::Message, std::slice::from_ref(&real))).unwrap(), [real]);
}

fn some_messages(random: &mut StdRng, count: usize) -> Vec<Message> {
    let mut at = (1, 0);
    let mut messages = Vec::new();
    for _ in 0..count {
        let log_term = at.0;
        if random.random_ratio(1, 8) {
            at = (at.0 + random.random_range(0..2), random.random_range(0..100));
        }
        let entries: Vec<Entry> = (0..random.random_range(0..4))
            .map(|i| {
                let mut data = vec![0; random.random_range(0..300)];
                random.fill_bytes(&mut data);
                Entry { term: Some(at.0), index: Some(at.1 + 1 + i), data: Some(data.into()), ..Entry::default() }
            })
            .collect();
        let more = entries.len() as u64;
        messages.push(append(at.0, log_term, at.1, entries, random.random_range(0..100)));
        at.1 += more;
    }
    messages
}

#[test]
fn streams_read_the_same_however_they_are_cut() {
    for seed in 0..40 {
        let mut random = StdRng::seed_from_u64(seed);
        let messages = some_messages(&mut random, 60);
        for kind in [Kind::Append, Kind::Message] {
            let (mut encoder, mut bytes) = (Encoder::new(kind), BytesMut::new());
            for message in &messages {
                if random.random_ratio(1, 5) {
                    encoder.link_heartbeat(&mut bytes);
                }
                encoder.message(message, &mut bytes);
            }
            let mut decoder = Decoder::new(kind, 1, 2);
            let mut found = Vec::new();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let n = random.random_range(1..=rest.len().min(if seed % 2 == 0 { 9 } else { 2000 }));
                decoder.push(&rest[..n]);
                rest = &rest[n..];
                while let Some(message) = decoder.next().unwrap() {
                    found.push(message);
                }
            }
            assert_eq!(found, messages, "seed {seed}");
            assert_eq!(decoder.next(), Ok(None));
        }
    }
}

#[test]
fn every_truncation_is_a_prefix_of_the_messages() {
    let messages = some_messages(&mut StdRng::seed_from_u64(7), 12);
    for kind in [Kind::Append, Kind::Message] {
        let bytes = encode(kind, &messages);
        for cut in 0..bytes.len() {
            let found = decode(kind, &bytes[..cut]).unwrap();
            assert!(found.len() < messages.len() && messages.starts_with(&found), "cut at {cut}");
        }
    }
}

#[test]
fn hostile_bytes_are_refused_without_panic_or_memory() {
    let max = "ffffffffffffffff";
    let one_more = format!("{:016x}", (512u64 << 20) + 1);
    for (kind, bytes, error) in [
        (Kind::Append, hex("03"), Error::UnknownFrame(3)),
        (Kind::Append, hex(&format!("02{max}")), Error::TooLong(u64::MAX)),
        (Kind::Append, hex(&format!("01{max}")), Error::TooManyEntries(u64::MAX)),
        (Kind::Append, hex(&format!("01 0000000000000001 {max}")), Error::TooLong(u64::MAX)),
        (Kind::Append, hex(&format!("01 0000000000000002 0000000000000000 {max}")), Error::TooLong(u64::MAX)),
        (Kind::Message, hex(max), Error::TooLong(u64::MAX)),
        (Kind::Message, hex(&one_more), Error::TooLong((512 << 20) + 1)),
    ] {
        assert_eq!(decode(kind, &bytes).unwrap_err(), error);
    }
    assert!(matches!(decode(Kind::Message, &hex("0000000000000001 ff")), Err(Error::Malformed(_))));
    // Two bytes for each entry.
    let many = [0x3a, 0].repeat((1 << 20) + 1);
    assert_eq!(message_from(&many), Err(Error::TooManyEntries((1 << 20) + 1)));
    // A nest of messages.
    let mut nest = Vec::new();
    for _ in 0..200 {
        let inner = Message { responses: vec![], ..Message::default() };
        let mut outer = inner.encode_to_vec();
        outer.push(0x72);
        prost::encoding::encode_varint(nest.len() as u64, &mut outer);
        outer.extend_from_slice(&nest);
        nest = outer;
    }
    assert!(matches!(message_from(&nest), Err(Error::Malformed(_))));
    let mut random = StdRng::seed_from_u64(3);
    let whole = encode(Kind::Append, &some_messages(&mut random, 10));
    for _ in 0..20_000 {
        let mut bytes = whole.clone();
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..bytes.len());
            bytes[at] = random.random();
        }
        let _ = decode(Kind::Append, &bytes);
        let _ = decode(Kind::Message, &bytes);
    }
}

#[test]
fn the_head_of_a_snapshot_ends_where_the_database_begins() {
    let message = Message { r#type: Some(MessageType::MsgSnap as i32), to: Some(2), ..Message::default() };
    let mut bytes = BytesMut::new();
    put_with_length(&message, &mut bytes);
    bytes.extend_from_slice(b"database");
    assert_eq!(bytes, hex("0000000000000004 0807 1002 6461746162617365"));
    for cut in 0..bytes.len() {
        let mut head = SnapshotHead::default();
        let (first, second) = bytes.split_at(cut);
        let early = head.push(first).unwrap();
        assert_eq!(early.is_some(), cut >= 12);
        let (found, rest) = match early {
            Some((found, rest)) => (found, [&rest, second].concat()),
            None => head.push(second).unwrap().map(|(found, rest)| (found, rest.to_vec())).unwrap(),
        };
        assert_eq!((found, &rest[..]), (message.clone(), &b"database"[..]));
    }
    let too_long = ((64u64 << 20) + 1).to_be_bytes();
    assert_eq!(SnapshotHead::default().push(&too_long), Err(Error::TooLong((64 << 20) + 1)));
}
