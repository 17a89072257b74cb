//! When to compact without being asked: the schedules, without the clock.
//!
//! The owner calls [`Schedule::tick`] every [`Schedule::tick_interval`] with the time and the current revision,
//! compacts what it names, and reports success with [`Schedule::compacted`]. Times are since any fixed origin.

use std::{collections::VecDeque, time::Duration};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Keep the history of a time span.
    Periodic,
    /// Keep a number of revisions.
    Revision,
}

const HOUR: Duration = Duration::from_secs(60 * 60);
/// How often the revision schedule looks.
const REVISION_INTERVAL: Duration = Duration::from_secs(5 * 60);
/// The periodic schedule samples this often per interval between compactions.
const SAMPLES_PER_INTERVAL: u32 = 10;

/// Reads a retention: in nanoseconds for the periodic mode, in revisions otherwise. A plain whole number means hours
/// or revisions; anything else is a Go duration, whose count of nanoseconds the revision mode takes for revisions.
pub fn parse_retention(mode: Mode, text: &str) -> Result<i64, String> {
    let plain = text.strip_prefix('+').unwrap_or(text);
    if !plain.is_empty()
        && plain.bytes().all(|b| b.is_ascii_digit())
        && let Ok(number) = plain.parse::<i64>()
    {
        return Ok(match mode {
            Mode::Periodic => number.saturating_mul(HOUR.as_nanos() as i64),
            Mode::Revision => number,
        });
    }
    parse_go_duration(text).map_err(|err| format!("error parsing CompactionRetention: {err}"))
}

/// Nanoseconds of a duration as Go writes it (`1h30m`, `-1.5s`, `300ms`), or Go's error text.
pub fn parse_go_duration(text: &str) -> Result<i64, String> {
    let invalid = || format!("time: invalid duration {}", go_quote(text));
    let (negative, mut rest) = match text.as_bytes() {
        [b'-', ..] => (true, &text[1..]),
        [b'+', ..] => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let digits = |s: &str| s.bytes().take_while(u8::is_ascii_digit).count();
        let whole_len = digits(rest);
        let whole: u64 = match &rest[..whole_len] {
            "" => 0,
            number => number.parse().ok().filter(|n| *n <= 1 << 63).ok_or_else(invalid)?,
        };
        let mut number_len = whole_len;
        let mut fraction = "";
        if rest[whole_len..].starts_with('.') {
            let len = digits(&rest[whole_len + 1..]);
            fraction = &rest[whole_len + 1..whole_len + 1 + len];
            number_len += 1 + len;
        }
        if whole_len + fraction.len() == 0 {
            return Err(invalid());
        }
        rest = &rest[number_len..];
        let unit_len = rest.bytes().take_while(|b| *b != b'.' && !b.is_ascii_digit()).count();
        if unit_len == 0 {
            return Err(format!("time: missing unit in duration {}", go_quote(text)));
        }
        let unit_name = &rest[..unit_len];
        let unit: u64 = match unit_name {
            "ns" => 1,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => {
                return Err(format!("time: unknown unit {} in duration {}", go_quote(unit_name), go_quote(text)));
            }
        };
        rest = &rest[unit_len..];
        // 18 digits of a fraction are more than a nanosecond of an hour needs.
        let shown = &fraction[..fraction.len().min(18)];
        let part = shown.parse::<u128>().unwrap_or(0) * u128::from(unit) / 10u128.pow(shown.len() as u32);
        let value = whole.checked_mul(unit).and_then(|v| v.checked_add(part as u64)).ok_or_else(invalid)?;
        total = total.checked_add(value).filter(|t| *t <= 1 << 63).ok_or_else(invalid)?;
    }
    match (negative, i64::try_from(total)) {
        (true, Ok(total)) => Ok(-total),
        (true, Err(_)) => Ok(i64::MIN),
        (false, Ok(total)) => Ok(total),
        (false, Err(_)) => Err(invalid()),
    }
}

/// Quotes as Go's duration errors do: control and non-ASCII bytes as `\x..`.
fn go_quote(text: &str) -> String {
    let mut out = String::from("\"");
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' => out.extend(['\\', byte as char]),
            b' '..=0x7f => out.push(byte as char),
            _ => out.push_str(&format!("\\x{byte:02x}")),
        }
    }
    out.push('"');
    out
}

/// When to compact to which revision.
#[derive(Debug)]
pub enum Schedule {
    Periodic(Periodic),
    Revision(Revision),
}

impl Schedule {
    /// Begins at `now`; `None` if `retention`, as [`parse_retention`] gives it, switches compaction off.
    pub fn new(mode: Mode, retention: i64, now: Duration, current: i64) -> Option<Self> {
        let retention = u64::try_from(retention).ok().filter(|r| *r > 0)?;
        Some(match mode {
            Mode::Periodic => Self::Periodic(Periodic::new(Duration::from_nanos(retention), now, current)),
            Mode::Revision => Self::Revision(Revision { retention: retention as i64, last: 0 }),
        })
    }

    /// Time from the start to the first tick, and from each tick to the next.
    pub fn tick_interval(&self) -> Duration {
        match self {
            Self::Periodic(periodic) => periodic.step,
            Self::Revision(_) => REVISION_INTERVAL,
        }
    }

    /// The revision to compact to now, if any. Only the leader acts; the others keep watching.
    pub fn tick(&mut self, now: Duration, current: i64, is_leader: bool) -> Option<i64> {
        match self {
            Self::Periodic(periodic) => periodic.tick(now, current, is_leader),
            Self::Revision(revision) => revision.tick(current, is_leader),
        }
    }

    /// The compaction to `revision` succeeded at `now`, or had been done already. Not called after a failure, it is
    /// tried again at the next tick.
    pub fn compacted(&mut self, now: Duration, revision: i64) {
        match self {
            Self::Periodic(periodic) => {
                periodic.last = revision;
                periodic.last_success = now;
            }
            Self::Revision(state) => state.last = revision,
        }
    }
}

/// Compacts to the revision that was current one retention ago.
#[derive(Debug)]
pub struct Periodic {
    period: Duration,
    /// Between compactions, once the first retention has passed.
    interval: Duration,
    step: Duration,
    /// The revisions at the past samples, oldest first.
    window: VecDeque<i64>,
    window_len: usize,
    /// Revision of the last successful compaction; 0 before.
    last: i64,
    last_success: Duration,
    attempted: bool,
}

impl Periodic {
    fn new(period: Duration, now: Duration, current: i64) -> Self {
        let interval = period.min(HOUR);
        let step = (interval / SAMPLES_PER_INTERVAL).max(Duration::from_nanos(1));
        let window_len = (period.as_nanos() / step.as_nanos()) as usize + 1;
        Self {
            period,
            interval,
            step,
            window: VecDeque::from([current]),
            window_len,
            last: 0,
            last_success: now,
            attempted: false,
        }
    }

    fn tick(&mut self, now: Duration, current: i64, is_leader: bool) -> Option<i64> {
        let target = is_leader.then(|| self.due(now)).flatten();
        self.window.push_back(current);
        if self.window.len() > self.window_len {
            self.window.pop_front();
        }
        target
    }

    fn due(&mut self, now: Duration) -> Option<i64> {
        let wait = if self.attempted { self.interval } else { self.period };
        let oldest = *self.window.front().expect("the window is never empty");
        if oldest == self.last || now.saturating_sub(self.last_success) < wait {
            return None;
        }
        self.attempted = true;
        Some(oldest)
    }
}

/// Compacts to the current revision less a number.
#[derive(Debug)]
pub struct Revision {
    retention: i64,
    /// Revision of the last successful compaction; 0 before.
    last: i64,
}

impl Revision {
    fn tick(&mut self, current: i64, is_leader: bool) -> Option<i64> {
        let target = current - self.retention;
        (is_leader && target > 0 && target != self.last).then_some(target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn retention_reads_whole_numbers_and_go_durations() {
        use Mode::*;
        for (mode, text, want) in [
            (Periodic, "0", 0),
            (Periodic, "1", 3_600_000_000_000),
            (Periodic, "24", 24 * 3_600_000_000_000),
            (Periodic, "10m", 600_000_000_000),
            (Periodic, "1h30m", 5_400_000_000_000),
            (Periodic, "0.5h", 1_800_000_000_000),
            (Periodic, "1.5s2ms3us4ns", 1_502_003_004),
            (Periodic, "1\u{b5}s", 1_000),
            (Revision, "1000", 1000),
            // The count of nanoseconds is taken for revisions.
            (Revision, "1h", 3_600_000_000_000),
            (Revision, "-1ns", -1),
        ] {
            assert_eq!(parse_retention(mode, text), Ok(want), "{text}");
        }
    }

    #[test]
    fn bad_retention_names_the_flag_and_the_reason() {
        for (text, want) in [
            ("", "time: invalid duration \"\""),
            ("x", "time: invalid duration \"x\""),
            ("-1", "time: missing unit in duration \"-1\""),
            ("1.5", "time: missing unit in duration \"1.5\""),
            ("1d", "time: unknown unit \"d\" in duration \"1d\""),
            ("1h.", "time: invalid duration \"1h.\""),
            ("9999999999h", "time: invalid duration \"9999999999h\""),
            ("99999999999999999999", "time: invalid duration \"99999999999999999999\""),
        ] {
            let want = format!("error parsing CompactionRetention: {want}");
            assert_eq!(parse_retention(Mode::Periodic, text), Err(want), "{text}");
        }
    }

    /// Ticks through `span`, the revision growing by one per minute; returns (time in minutes, revision) of each
    /// compaction, all of which succeed.
    fn run(retention: &str, span: Duration) -> Vec<(u64, i64)> {
        let nanos = parse_retention(Mode::Periodic, retention).unwrap();
        let mut schedule = Schedule::new(Mode::Periodic, nanos, Duration::ZERO, 1).unwrap();
        let mut out = Vec::new();
        let mut now = Duration::ZERO;
        while now < span {
            now += schedule.tick_interval();
            let minutes = now.as_secs() / 60;
            if let Some(rev) = schedule.tick(now, 1 + minutes as i64, true) {
                out.push((minutes, rev));
                schedule.compacted(now, rev);
            }
        }
        out
    }

    // KV-86. The window is one sample longer than the retention, so that later targets are one step older.
    #[test]
    fn short_period_compacts_every_period() {
        assert_eq!(run("10m", 35 * MINUTE), [(10, 1), (20, 10), (30, 20)]);
    }

    // KV-86
    #[test]
    fn long_period_compacts_hourly_after_the_first() {
        assert_eq!(run("24h", 27 * HOUR), [(1440, 1), (1500, 55), (1560, 115), (1620, 175)]);
    }

    #[test]
    fn samples_come_ten_to_the_interval() {
        for (retention, minutes) in [("10m", 1), ("1h", 6), ("24h", 6)] {
            let nanos = parse_retention(Mode::Periodic, retention).unwrap();
            let schedule = Schedule::new(Mode::Periodic, nanos, Duration::ZERO, 1).unwrap();
            assert_eq!(schedule.tick_interval(), minutes * MINUTE, "{retention}");
        }
    }

    #[test]
    fn follower_samples_but_does_nothing() {
        let mut schedule = Schedule::new(Mode::Periodic, 600_000_000_000, Duration::ZERO, 1).unwrap();
        for minute in 1..=15 {
            assert_eq!(schedule.tick(minute * MINUTE, 1 + i64::from(minute), false), None);
        }
        // Elected, it compacts at once, to what was current one retention ago.
        assert_eq!(schedule.tick(16 * MINUTE, 17, true), Some(6));
    }

    #[test]
    fn failure_is_tried_again_at_the_next_step() {
        let mut schedule = Schedule::new(Mode::Periodic, 600_000_000_000, Duration::ZERO, 5).unwrap();
        for minute in 1..10 {
            assert_eq!(schedule.tick(minute * MINUTE, 5, true), None);
        }
        assert_eq!(schedule.tick(10 * MINUTE, 5, true), Some(5));
        assert_eq!(schedule.tick(11 * MINUTE, 5, true), Some(5));
        schedule.compacted(11 * MINUTE, 5);
        // Nothing was written since: nothing to do.
        for minute in 12..40 {
            assert_eq!(schedule.tick(minute * MINUTE, 5, true), None);
        }
    }

    // KV-86
    #[test]
    fn revision_mode_keeps_a_number_of_revisions() {
        let mut schedule = Schedule::new(Mode::Revision, 100, Duration::ZERO, 1).unwrap();
        assert_eq!(schedule.tick_interval(), 5 * MINUTE);
        assert_eq!(schedule.tick(MINUTE, 100, true), None);
        assert_eq!(schedule.tick(MINUTE, 101, false), None);
        assert_eq!(schedule.tick(MINUTE, 101, true), Some(1));
        assert_eq!(schedule.tick(MINUTE, 101, true), Some(1), "not reported done");
        schedule.compacted(MINUTE, 1);
        assert_eq!(schedule.tick(MINUTE, 101, true), None);
        assert_eq!(schedule.tick(MINUTE, 150, true), Some(50));
    }

    #[test]
    fn zero_retention_is_off() {
        assert!(Schedule::new(Mode::Periodic, 0, Duration::ZERO, 1).is_none());
        assert!(Schedule::new(Mode::Revision, 0, Duration::ZERO, 1).is_none());
    }
}
