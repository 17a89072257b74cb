//! Prometheus's text: families, samples and numbers, written as Go's client writes them. Which there are is said elsewhere.

use std::{
    fmt::{self, Write},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use super::Histogram;

/// Exposition text. Every family begins with its head.
#[derive(Default)]
pub struct Text(pub String);

impl Text {
    pub fn head(&mut self, name: &str, kind: &str, help: &str) -> &mut Self {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        self
    }

    /// The head of a family that only shows with samples.
    pub fn head_if(&mut self, shows: bool, name: &str, kind: &str, help: &str) {
        if shows {
            self.head(name, kind, help);
        }
    }

    /// Labels stand in the order of their names, the bound of a bucket last.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Value) -> &mut Self {
        self.0.push_str(name);
        if !labels.is_empty() {
            let mut labels = labels.to_vec();
            labels.sort_by_key(|(label, _)| (*label == "le", *label));
            self.0.push('{');
            for (i, (label, text)) in labels.iter().enumerate() {
                let text = text.replace('\\', "\\\\").replace('"', "\\\"");
                let _ = write!(self.0, "{}{label}=\"{text}\"", if i > 0 { "," } else { "" });
            }
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {}", Number(value.to_f64()));
        self
    }

    pub fn one(&mut self, kind: &str, name: &str, help: &str, value: impl Value) {
        self.head(name, kind, help).sample(name, &[], value);
    }

    pub fn gauge(&mut self, name: &str, help: &str, value: impl Value) {
        self.one("gauge", name, help, value);
    }

    pub fn counter(&mut self, name: &str, help: &str, value: &AtomicU64) {
        self.one("counter", name, help, value.load(Relaxed));
    }

    pub fn histogram(&mut self, name: &str, help: &str, of: &Histogram) {
        self.head(name, "histogram", help);
        self.times(name, &[], of);
    }

    /// The samples of one histogram of a family.
    pub fn times(&mut self, name: &str, labels: &[(&str, &str)], of: &Histogram) {
        let (buckets, count, sum) = of.read();
        let bucket = format!("{name}_bucket");
        for (bound, n) in buckets {
            self.sample(&bucket, &[labels, &[("le", &Number(bound).to_string())]].concat(), n);
        }
        self.sample(&bucket, &[labels, &[("le", "+Inf")]].concat(), count);
        self.sample(&format!("{name}_sum"), labels, sum);
        self.sample(&format!("{name}_count"), labels, count);
    }
}

/// What a sample may be; Prometheus knows floats alone.
pub trait Value {
    fn to_f64(self) -> f64;
}

macro_rules! values {
    ($($t:ty)*) => {
        $(impl Value for $t {
            fn to_f64(self) -> f64 {
                self as f64
            }
        })*
    };
}
values!(u8 u32 u64 usize i32 i64 f64);

/// A number as Go's `%g` has it: with an exponent from a million on, and below a ten-thousandth.
struct Number(f64);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(number) = *self;
        if number == 0.0 || !number.is_finite() || (1e-4..1e6).contains(&number.abs()) {
            return write!(f, "{number}");
        }
        let text = format!("{number:e}");
        let (digits, exponent) = text.split_once('e').ok_or(fmt::Error)?;
        let exponent: i32 = exponent.parse().map_err(|_| fmt::Error)?;
        write!(f, "{digits}e{exponent:+03}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_gos() {
        for (number, text) in [
            (0.0, "0"),
            (1.0, "1"),
            (-1.0, "-1"),
            (0.005, "0.005"),
            (0.0001, "0.0001"),
            (0.00005, "5e-05"),
            (999_999.0, "999999"),
            (1e6, "1e+06"),
            (1_048_576.0, "1.048576e+06"),
            (2_147_483_648.0, "2.147483648e+09"),
            (-2_000_000.0, "-2e+06"),
            (1_763_759_137.25, "1.76375913725e+09"),
            (1.8446744073709552e19, "1.8446744073709552e+19"),
            (1e100, "1e+100"),
        ] {
            assert_eq!(Number(number).to_string(), text);
        }
    }

    #[test]
    fn labels_stand_in_order_and_the_bound_last() {
        let mut text = Text::default();
        text.sample("a", &[("to", "x\"y"), ("le", "1"), ("from", "\\")], 3u64).sample("b", &[], 0.5);
        assert_eq!(text.0, "a{from=\"\\\\\",to=\"x\\\"y\",le=\"1\"} 3\nb 0.5\n");
    }
}
