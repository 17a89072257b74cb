//! Clients that ping too often: gRPC's rules for servers, on the bytes of one connection.
//!
//! A ping is bad if it comes sooner after the one before than the shortest gap allowed; without an open call that gap is two
//! hours. Whatever the server has answered in between excuses it. The third bad one ends the connection. The HTTP/2
//! library answers pings without telling anybody, so frames are recognised here, by their heads alone.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEAD_BYTES: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const ENHANCE_YOUR_CALM: u32 = 11;
/// Bad pings that are let pass.
const STRIKES_MAX: u32 = 2;
/// Between pings of a client that asks for nothing.
const IDLE_GAP: Duration = Duration::from_secs(2 * 3600);

struct Head {
    kind: u8,
    flags: u8,
    stream: u32,
}

/// Finds the heads of frames in a stream of bytes, however they are cut.
#[derive(Default)]
struct Frames {
    head: [u8; HEAD_BYTES],
    have: usize,
    payload_left: usize,
}

impl Frames {
    /// The next head that `bytes` completes; they are consumed up to it.
    fn next(&mut self, bytes: &mut &[u8]) -> Option<Head> {
        let skipped = self.payload_left.min(bytes.len());
        self.payload_left -= skipped;
        *bytes = &bytes[skipped..];
        let taken = (HEAD_BYTES - self.have).min(bytes.len());
        self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
        *bytes = &bytes[taken..];
        self.have += taken;
        if self.have < HEAD_BYTES {
            return None;
        }
        self.have = 0;
        let [a, b, c, kind, flags, s, t, u, v] = self.head;
        self.payload_left = u32::from_be_bytes([0, a, b, c]) as usize;
        Some(Head { kind, flags, stream: u32::from_be_bytes([s & 0x7f, t, u, v]) })
    }

    fn is_between(&self) -> bool {
        self.have == 0 && self.payload_left == 0
    }
}

pub struct Pings {
    least_gap: Duration,
    /// Bytes of the preface still to come; `None`: this is not HTTP/2.
    preface_left: Option<usize>,
    incoming: Frames,
    outgoing: Frames,
    open: HashSet<u32>,
    newest: u32,
    /// Something was answered since the last ping.
    has_answered: bool,
    last: Option<Instant>,
    strikes: u32,
}

impl Pings {
    pub fn new(least_gap: Duration) -> Self {
        Self {
            least_gap,
            preface_left: Some(PREFACE.len()),
            incoming: Frames::default(),
            outgoing: Frames::default(),
            open: HashSet::new(),
            newest: 0,
            has_answered: false,
            last: None,
            strikes: 0,
        }
    }

    /// What the client has sent. False: there were too many pings.
    pub fn received(&mut self, mut bytes: &[u8], now: impl Fn() -> Instant) -> bool {
        let Some(left) = self.preface_left else { return true };
        let (preface, frames) = bytes.split_at(left.min(bytes.len()));
        if !PREFACE[PREFACE.len() - left..].starts_with(preface) {
            self.preface_left = None;
            return true;
        }
        self.preface_left = Some(left - preface.len());
        bytes = frames;
        let mut are_few = true;
        while let Some(head) = self.incoming.next(&mut bytes) {
            match head.kind {
                HEADERS if head.stream > self.newest => {
                    self.newest = head.stream;
                    self.open.insert(head.stream);
                }
                RST_STREAM => drop(self.open.remove(&head.stream)),
                PING if head.flags & ACK == 0 => are_few &= self.pinged(now()),
                _ => {}
            }
        }
        are_few
    }

    /// What the server has sent.
    pub fn sent(&mut self, mut bytes: &[u8]) {
        if self.preface_left.is_none() {
            return;
        }
        while let Some(head) = self.outgoing.next(&mut bytes) {
            self.has_answered |= matches!(head.kind, DATA | HEADERS);
            let is_last =
                head.kind == RST_STREAM || matches!(head.kind, DATA | HEADERS) && head.flags & END_STREAM != 0;
            if is_last {
                self.open.remove(&head.stream);
            }
        }
    }

    fn pinged(&mut self, now: Instant) -> bool {
        let last = self.last.replace(now);
        if std::mem::take(&mut self.has_answered) {
            self.strikes = 0;
            return true;
        }
        let gap = if self.open.is_empty() { IDLE_GAP } else { self.least_gap };
        if last.is_some_and(|last| now < last + gap) {
            self.strikes += 1;
        }
        self.strikes <= STRIKES_MAX
    }

    /// The last words to such a client; `None` in the middle of a frame.
    pub fn goodbye(&self) -> Option<Vec<u8>> {
        const WHY: &[u8] = b"too_many_pings";
        let mut frame = vec![0, 0, 8 + WHY.len() as u8, GOAWAY, 0, 0, 0, 0, 0];
        frame.extend(self.newest.to_be_bytes());
        frame.extend(ENHANCE_YOUR_CALM.to_be_bytes());
        frame.extend(WHY);
        self.outgoing.is_between().then_some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GAP: Duration = Duration::from_secs(5);

    fn frame(kind: u8, flags: u8, stream: u32, payload: usize) -> Vec<u8> {
        let mut bytes = (payload as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags]);
        bytes.extend(stream.to_be_bytes());
        bytes.resize(HEAD_BYTES + payload, 0xff);
        bytes
    }

    /// A connection on which a call is open, and the time.
    struct Connection(Pings, Instant);

    impl Connection {
        fn new() -> Self {
            let mut connection = Self(Pings::new(GAP), Instant::now());
            assert!(connection.receives(&[PREFACE.to_vec(), frame(4, 0, 0, 18)].concat()));
            connection
        }

        fn receives(&mut self, bytes: &[u8]) -> bool {
            let now = self.1;
            // Cut anywhere.
            bytes.chunks(7).fold(true, |few, piece| few & self.0.received(piece, || now))
        }

        fn ping_after(&mut self, gap: Duration) -> bool {
            self.1 += gap;
            self.receives(&frame(PING, 0, 0, 8))
        }

        fn answers(&mut self, kind: u8, flags: u8, stream: u32) {
            frame(kind, flags, stream, 100).chunks(11).for_each(|piece| self.0.sent(piece));
        }
    }

    #[test]
    fn the_third_ping_too_early_is_one_too_many() {
        let mut one = Connection::new();
        assert!(one.receives(&frame(HEADERS, 4, 1, 50)));
        let early = GAP - Duration::from_millis(1);
        assert!(one.ping_after(Duration::ZERO), "the first is never too early");
        assert!(one.ping_after(early) && one.ping_after(early));
        assert!(!one.ping_after(early));
    }

    #[test]
    fn pings_at_the_allowed_gap_may_go_on_for_ever() {
        let mut one = Connection::new();
        assert!(one.receives(&frame(HEADERS, 4, 1, 50)));
        assert!((0..100).all(|_| one.ping_after(GAP)));
        // Acknowledgements of the server's own are none.
        assert!((0..100).all(|_| one.receives(&frame(PING, ACK, 0, 8))));
    }

    #[test]
    fn answers_excuse_what_was_before() {
        let mut one = Connection::new();
        assert!(one.receives(&frame(HEADERS, 4, 1, 50)));
        for _ in 0..100 {
            assert!(one.ping_after(Duration::ZERO) && one.ping_after(Duration::ZERO));
            one.answers(DATA, 0, 1);
        }
        one.answers(PING, ACK, 0);
        assert!((0..3).all(|_| one.ping_after(Duration::ZERO)), "the one that is excused, and two more");
        assert!(!one.ping_after(Duration::ZERO), "settings and acknowledgements excuse nothing");
    }

    #[test]
    fn without_a_call_pings_are_bad_within_two_hours() {
        for end in ["answered", "given up", "reset"] {
            let mut one = Connection::new();
            assert!(one.receives(&frame(HEADERS, 4, 1, 50)));
            match end {
                "answered" => one.answers(HEADERS, END_STREAM, 1),
                "given up" => assert!(one.receives(&frame(RST_STREAM, 0, 1, 4))),
                _ => one.answers(RST_STREAM, 0, 1),
            }
            // One may be excused by the answer.
            assert!(one.ping_after(GAP) && one.ping_after(GAP) && one.ping_after(GAP), "{end}");
            assert!(!(one.ping_after(GAP) && one.ping_after(GAP)), "{end}");
            let mut idle = Connection::new();
            assert!((0..10).all(|_| idle.ping_after(IDLE_GAP)));
        }
    }

    #[test]
    fn only_http2_is_looked_at() {
        let mut pings = Pings::new(GAP);
        let ping = frame(PING, 0, 0, 8);
        assert!(pings.received(b"PRI /health HTTP/1.1\r\n\r\n", Instant::now));
        assert!((0..10).all(|_| pings.received(&ping, Instant::now)));
    }

    #[test]
    fn goodbye_waits_for_the_end_of_a_frame() {
        let mut pings = Pings::new(GAP);
        let answer = frame(DATA, 0, 1, 100);
        pings.sent(&answer[..50]);
        assert_eq!(pings.goodbye(), None);
        pings.sent(&answer[50..]);
        let goodbye = pings.goodbye().expect("between two frames");
        let mut frames = Frames::default();
        let mut rest = goodbye.as_slice();
        assert_eq!(frames.next(&mut rest).map(|head| (head.kind, head.stream)), Some((GOAWAY, 0)));
        assert_eq!((rest.len(), frames.payload_left), (22, 22));
        assert_eq!(rest[4..], [&[0, 0, 0, 11][..], b"too_many_pings"].concat());
    }
}
