//! Release numbers, as far as members compare them.

use std::{fmt, str::FromStr};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u64,
    pub minor: u64,
    pub patch: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no version of the form major.minor.patch")]
pub struct ParseError(String);

impl Version {
    pub const fn new(major: u64, minor: u64, patch: u64) -> Self {
        Self { major, minor, patch }
    }

    /// What the members agree on: major and minor.
    pub fn cluster_version(self) -> Self {
        Self { patch: 0, ..self }
    }

    /// `self` is exactly one minor release below `other`: what a downgrade may go to.
    pub fn is_one_minor_below(self, other: Self) -> bool {
        self.major == other.major && self.minor.checked_add(1) == Some(other.minor)
    }
}

impl FromStr for Version {
    type Err = ParseError;

    /// `3.7.1`; what follows a `-` or `+` is ignored.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let number = |digits: &str| digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten();
        let core = text.split(['-', '+']).next().unwrap_or_default();
        let mut parts = core.split('.').map(number);
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(Some(major)), Some(Some(minor)), Some(Some(patch)), None) => Ok(Self { major, minor, patch }),
            _ => Err(ParseError(text.to_owned())),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}
