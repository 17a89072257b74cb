//! Go's ways of writing booleans and integers, and of splitting a command line into flags.
//! Knows the shape of flags, not which flags exist.

/// What Go's flag package says about a number or boolean it cannot read.
pub const PARSE_ERROR: &str = "parse error";
const OUT_OF_RANGE: &str = "value out of range";

pub fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

pub fn parse_uint(text: &str, max: u64) -> Result<u64, &'static str> {
    let (radix, digits) = number_parts(text).ok_or(PARSE_ERROR)?;
    // All characters are digits of the radix by now, so the only failure left is the size.
    u64::from_str_radix(&digits, radix).ok().filter(|value| *value <= max).ok_or(OUT_OF_RANGE)
}

pub fn parse_int(text: &str) -> Result<i64, &'static str> {
    let (negative, unsigned) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    let magnitude = i128::from(parse_uint(unsigned, u64::MAX)?);
    i64::try_from(if negative { -magnitude } else { magnitude }).map_err(|_| OUT_OF_RANGE)
}

/// Radix and bare digits of an unsigned Go literal: `12`, `0x1F`, `0o17`, `017`, `0b1`, `1_000`. An underscore stands
/// between two digits or between the prefix and a digit.
fn number_parts(text: &str) -> Option<(u32, String)> {
    let lower = text.to_ascii_lowercase();
    let (radix, digits, prefixed) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..], true),
        [b'0', b'o', ..] => (8, &lower[2..], true),
        [b'0', b'b', ..] => (2, &lower[2..], true),
        [b'0', _, ..] => (8, &lower[1..], true),
        _ => (10, lower.as_str(), false),
    };
    let mut after_digit = prefixed;
    let mut bare = String::with_capacity(digits.len());
    for c in digits.chars() {
        if c == '_' && after_digit {
            after_digit = false;
        } else if c.is_digit(radix) {
            bare.push(c);
            after_digit = true;
        } else {
            return None;
        }
    }
    (after_digit && !bare.is_empty()).then_some((radix, bare))
}

/// One flag as written: `value` is `None` for a bare boolean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    pub name: String,
    pub value: Option<String>,
}

/// What the next piece of a command line is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    Flag(Given),
    /// `-h`, `-help`, with any value.
    Help,
    /// Flags are over; the words that are left.
    Rest(Vec<String>),
    /// Not a flag at all; the message to print.
    Bad(String),
}

/// What a known flag needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// Takes the next word if no `=` gave a value.
    Value,
    /// Never takes the next word.
    Switch,
}

/// Takes flags off the front of a command line one at a time, so that the first problem from the left is the one
/// reported. `arity` says what a name needs, or `None` if there is no such flag.
pub struct CommandLine<I: Iterator<Item = String>, F: Fn(&str) -> Option<Arity>> {
    words: I,
    arity: F,
}

impl<I: Iterator<Item = String>, F: Fn(&str) -> Option<Arity>> CommandLine<I, F> {
    pub fn new(words: I, arity: F) -> Self {
        CommandLine { words, arity }
    }

    pub fn next_flag(&mut self) -> Next {
        let Some(word) = self.words.next() else { return Next::Rest(Vec::new()) };
        // A lone dash is a word like any other.
        if !word.starts_with('-') || word == "-" {
            return Next::Rest(std::iter::once(word).chain(&mut self.words).collect());
        }
        if word == "--" {
            return Next::Rest(self.words.by_ref().collect());
        }
        let body = word.strip_prefix("--").unwrap_or(&word[1..]);
        if body.starts_with('-') || body.starts_with('=') {
            return Next::Bad(format!("bad flag syntax: {word}"));
        }
        let (name, value) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (body, None),
        };
        let name = name.to_owned();
        match (self.arity)(&name) {
            None if name == "help" || name == "h" => Next::Help,
            None => Next::Bad(format!("flag provided but not defined: -{name}")),
            Some(Arity::Switch) => Next::Flag(Given { name, value }),
            Some(Arity::Value) => match value.or_else(|| self.words.next()) {
                Some(value) => Next::Flag(Given { name, value: Some(value) }),
                None => Next::Bad(format!("flag needs an argument: -{name}")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_follow_gos_literals() {
        let good: &[(&str, u64)] = &[
            ("0", 0),
            ("12", 12),
            ("1_000", 1000),
            ("0x1F", 31),
            ("0X1f", 31),
            ("0x_1f", 31),
            ("0o17", 15),
            ("017", 15),
            ("0_17", 15),
            ("0b101", 5),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, value) in good {
            assert_eq!(parse_uint(text, u64::MAX), Ok(*value), "{text}");
        }
        for text in ["", "_1", "1_", "1__0", "0x", "0x_", "08", "0b2", "abc", "-1", "+1", " 1", "1 ", "1.0", "1e3"] {
            assert_eq!(parse_uint(text, u64::MAX), Err(PARSE_ERROR), "{text}");
        }
        assert_eq!(parse_uint("18446744073709551616", u64::MAX), Err(OUT_OF_RANGE));
        assert_eq!(parse_uint("4294967296", u32::MAX.into()), Err(OUT_OF_RANGE));
    }

    #[test]
    fn signed_integers_reach_both_ends() {
        assert_eq!(parse_int("-9223372036854775808"), Ok(i64::MIN));
        assert_eq!(parse_int("+0x10"), Ok(16));
        assert_eq!(parse_int("9223372036854775808"), Err(OUT_OF_RANGE));
        assert_eq!(parse_int("--1"), Err(PARSE_ERROR));
        assert_eq!(parse_int("-"), Err(PARSE_ERROR));
    }

    fn split(words: &[&str]) -> (Vec<String>, Next) {
        let arity = |name: &str| match name {
            "s" => Some(Arity::Switch),
            "v" => Some(Arity::Value),
            _ => None,
        };
        let mut line = CommandLine::new(words.iter().map(|w| w.to_string()), arity);
        let mut flags = Vec::new();
        loop {
            match line.next_flag() {
                Next::Flag(Given { name, value }) => flags.push(format!("{name}:{}", value.as_deref().unwrap_or("~"))),
                end => return (flags, end),
            }
        }
    }

    #[test]
    fn command_lines_split_as_in_go() {
        let rest = |words: &[&str]| Next::Rest(words.iter().map(|w| w.to_string()).collect());
        let bad = |text: &str| Next::Bad(text.to_owned());
        let cases: Vec<(&[&str], &[&str], Next)> = vec![
            (&[], &[], rest(&[])),
            (&["-v", "1", "--v", "2", "-v=3", "--v=4"], &["v:1", "v:2", "v:3", "v:4"], rest(&[])),
            (&["--v="], &["v:"], rest(&[])),
            (&["--v=a=b"], &["v:a=b"], rest(&[])),
            (&["-v", "-s"], &["v:-s"], rest(&[])),
            (&["-v", "--", "-s"], &["v:--", "s:~"], rest(&[])),
            (&["-s", "true"], &["s:~"], rest(&["true"])),
            (&["-s=false"], &["s:false"], rest(&[])),
            (&["--", "-s"], &[], rest(&["-s"])),
            (&["-", "-s"], &[], rest(&["-", "-s"])),
            (&["word", "-s"], &[], rest(&["word", "-s"])),
            (&["-v"], &[], bad("flag needs an argument: -v")),
            (&["---v=x"], &[], bad("bad flag syntax: ---v=x")),
            (&["--=x"], &[], bad("bad flag syntax: --=x")),
            (&["-=x"], &[], bad("bad flag syntax: -=x")),
            (&["--foo=1"], &[], bad("flag provided but not defined: -foo")),
            (&["-s", "-h"], &["s:~"], Next::Help),
            (&["--help=x"], &[], Next::Help),
        ];
        for (words, flags, end) in cases {
            assert_eq!(split(words), (flags.iter().map(|f| f.to_string()).collect(), end), "{words:?}");
        }
    }
}
