//! Durations as Go writes and reads them: `300ms`, `1h30m`, `-1.5s`. Used by flags, logs and auto-compaction.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A signed number of nanoseconds. Signed because etcd's flags accept negative durations and judge them later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GoDuration(i64);

const MICROSECOND: i64 = 1_000;
const MILLISECOND: i64 = 1_000 * MICROSECOND;
const SECOND: i64 = 1_000 * MILLISECOND;
const MINUTE: i64 = 60 * SECOND;
const HOUR: i64 = 60 * MINUTE;

impl GoDuration {
    pub const ZERO: GoDuration = GoDuration(0);

    pub const fn from_nanos(nanos: i64) -> Self {
        GoDuration(nanos)
    }

    pub const fn from_millis(millis: i64) -> Self {
        GoDuration(millis * MILLISECOND)
    }

    pub const fn from_secs(secs: i64) -> Self {
        GoDuration(secs * SECOND)
    }

    /// `None` when so many hours do not fit into 64 bits of nanoseconds (about 292 years).
    pub fn from_hours(hours: i64) -> Option<Self> {
        hours.checked_mul(HOUR).map(GoDuration)
    }

    pub const fn nanos(self) -> i64 {
        self.0
    }

    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Negative durations become zero: a wait that lies in the past is over.
    pub fn to_std(self) -> Duration {
        Duration::from_nanos(u64::try_from(self.0).unwrap_or(0))
    }

    /// Zero and less stand for `default` in several settings.
    pub fn or_if_unset(self, default: Duration) -> Duration {
        if self.0 <= 0 { default } else { self.to_std() }
    }
}

impl From<Duration> for GoDuration {
    /// Durations beyond 292 years are cut to that.
    fn from(duration: Duration) -> Self {
        GoDuration(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX))
    }
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.0 < 0 { "-" } else { "" };
        let total = self.0.unsigned_abs();
        // Below a second the unit shrinks until the number in front of the point is not zero.
        let text = match total {
            0 => return f.write_str("0s"),
            1..1_000 => format!("{total}ns"),
            1_000..1_000_000 => format!("{}µs", decimal(total, 3)),
            1_000_000..1_000_000_000 => format!("{}ms", decimal(total, 6)),
            _ => {
                let (hours, rest) = (total / HOUR as u64, total % HOUR as u64);
                let (minutes, rest) = (rest / MINUTE as u64, rest % MINUTE as u64);
                let seconds = decimal(rest, 9);
                match (hours, minutes) {
                    (0, 0) => format!("{seconds}s"),
                    (0, _) => format!("{minutes}m{seconds}s"),
                    _ => format!("{hours}h{minutes}m{seconds}s"),
                }
            }
        };
        write!(f, "{sign}{text}")
    }
}

/// `value / 10^places` without trailing zeros.
fn decimal(value: u64, places: u32) -> String {
    let unit = 10u64.pow(places);
    let (whole, fraction) = (value / unit, value % unit);
    if fraction == 0 {
        return whole.to_string();
    }
    let digits = format!("{fraction:0width$}", width = places as usize);
    format!("{whole}.{}", digits.trim_end_matches('0'))
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    #[error("time: invalid duration {0:?}")]
    Invalid(String),
    #[error("time: missing unit in duration {0:?}")]
    MissingUnit(String),
    #[error("time: unknown unit {1:?} in duration {0:?}")]
    UnknownUnit(String, String),
}

impl FromStr for GoDuration {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let invalid = || ParseError::Invalid(text.to_owned());
        let (negative, unsigned) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        if unsigned == "0" {
            return Ok(GoDuration::ZERO);
        }
        if unsigned.is_empty() {
            return Err(invalid());
        }
        // In 128 bits neither a term nor the sum can wrap before it is compared with the bound.
        let mut total: u128 = 0;
        let mut rest = unsigned;
        while !rest.is_empty() {
            let (whole, after) = digits(rest);
            let (fraction, after) = match after.strip_prefix('.') {
                Some(after) => digits(after),
                None => ("", after),
            };
            if whole.is_empty() && fraction.is_empty() {
                return Err(invalid());
            }
            let unit_end = after.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(after.len());
            let (unit, next) = after.split_at(unit_end);
            if unit.is_empty() {
                return Err(ParseError::MissingUnit(text.to_owned()));
            }
            let scale =
                unit_nanos(unit).ok_or_else(|| ParseError::UnknownUnit(text.to_owned(), unit.to_owned()))? as u128;
            let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| invalid())? };
            total += u128::from(whole) * scale + fraction_nanos(fraction, scale);
            if total > i64::MAX as u128 + 1 {
                return Err(invalid());
            }
            rest = next;
        }
        let nanos = if negative { -(total as i128) } else { total as i128 };
        i64::try_from(nanos).map(GoDuration).map_err(|_| invalid())
    }
}

fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// The part behind the point, cut to whole nanoseconds. Eighteen digits are more than any unit can show.
fn fraction_nanos(fraction: &str, scale: u128) -> u128 {
    let shown = &fraction[..fraction.len().min(18)];
    match shown.parse::<u128>() {
        Ok(value) => value * scale / 10u128.pow(shown.len() as u32),
        Err(_) => 0,
    }
}

fn unit_nanos(unit: &str) -> Option<i64> {
    Some(match unit {
        "ns" => 1,
        "us" | "µs" | "μs" => MICROSECOND,
        "ms" => MILLISECOND,
        "s" => SECOND,
        "m" => MINUTE,
        "h" => HOUR,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_and_written_as_go_does() {
        let cases: &[(&str, i64, &str)] = &[
            ("0", 0, "0s"),
            ("-0", 0, "0s"),
            ("0s", 0, "0s"),
            ("1ns", 1, "1ns"),
            ("1100ns", 1_100, "1.1µs"),
            ("1us", 1_000, "1µs"),
            ("1µs", 1_000, "1µs"),
            ("1μs", 1_000, "1µs"),
            ("300ms", 300 * MILLISECOND, "300ms"),
            ("2200us", 2_200 * MICROSECOND, "2.2ms"),
            ("1h30m", 90 * MINUTE, "1h30m0s"),
            ("2h", 2 * HOUR, "2h0m0s"),
            ("90s", 90 * SECOND, "1m30s"),
            ("1.5h", 90 * MINUTE, "1h30m0s"),
            (".5s", 500 * MILLISECOND, "500ms"),
            ("5.s", 5 * SECOND, "5s"),
            ("+3m", 3 * MINUTE, "3m0s"),
            ("-1.5s", -1_500 * MILLISECOND, "-1.5s"),
            ("1m1s1ms", MINUTE + SECOND + MILLISECOND, "1m1.001s"),
            ("1s1s", 2 * SECOND, "2s"),
            ("0.3333333333333333333h", 20 * MINUTE - 1, "19m59.999999999s"),
            ("9223372036854775807ns", i64::MAX, "2562047h47m16.854775807s"),
            ("-9223372036854775808ns", i64::MIN, "-2562047h47m16.854775808s"),
        ];
        for (text, nanos, written) in cases {
            let duration: GoDuration = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(duration.nanos(), *nanos, "{text}");
            assert_eq!(duration.to_string(), *written, "{text}");
            assert_eq!(written.parse::<GoDuration>(), Ok(duration), "{written} does not read back");
        }
    }

    #[test]
    fn bad_texts_are_refused_with_gos_words() {
        let cases = [
            ("", r#"time: invalid duration """#),
            ("-", r#"time: invalid duration "-""#),
            ("x", r#"time: invalid duration "x""#),
            (".s", r#"time: invalid duration ".s""#),
            ("--1s", r#"time: invalid duration "--1s""#),
            ("5", r#"time: missing unit in duration "5""#),
            ("-1", r#"time: missing unit in duration "-1""#),
            ("1x", r#"time: unknown unit "x" in duration "1x""#),
            ("1d", r#"time: unknown unit "d" in duration "1d""#),
            ("1 s", r#"time: unknown unit " s" in duration "1 s""#),
            ("9223372036854775808ns", r#"time: invalid duration "9223372036854775808ns""#),
            ("99999999999999999999h", r#"time: invalid duration "99999999999999999999h""#),
        ];
        for (text, error) in cases {
            assert_eq!(text.parse::<GoDuration>().unwrap_err().to_string(), error);
        }
    }
}
