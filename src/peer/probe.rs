//! Asks the other member every few seconds how far away it is and what its clock says.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1::SendRequest;
use serde::Deserialize;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::{dial, metrics::PeerNumbers, status::Urls, wire::Shared};
use crate::{cluster::ids::hex, config::Url, telemetry::logs::timestamp};

const INTERVAL: Duration = Duration::from_secs(4);
/// Clocks further apart than this are told of.
const CLOCK_DIFFERENCE_MAX: f64 = 1.0;
const ANSWER_MAX: usize = 4096;

pub const PATH: &str = "/raft/probing";

/// The answer of this member to a probe.
pub fn answer() -> String {
    format!("{{\"OK\":true,\"Now\":\"{}\"}}\n", timestamp(now()))
}

#[derive(Deserialize)]
struct Health {
    #[serde(rename = "OK")]
    ok: bool,
    #[serde(rename = "Now")]
    now: String,
}

pub struct Prober {
    pub shared: Arc<Shared>,
    pub numbers: Arc<PeerNumbers>,
    pub urls: Arc<Urls>,
    pub id: u64,
}

type Connection = SendRequest<Empty<Bytes>>;

impl Prober {
    pub async fn run(self) {
        let mut connections: HashMap<Url, Connection> = HashMap::new();
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        let mut apart = false;
        loop {
            ticks.tick().await;
            let urls = self.urls.all();
            connections.retain(|url, _| urls.contains(url));
            for url in urls {
                let kept = connections.remove(&url);
                match timeout(INTERVAL, self.probe(&url, kept)).await {
                    Ok(Ok((connection, difference))) => {
                        connections.insert(url, connection);
                        let far = difference.abs() > CLOCK_DIFFERENCE_MAX;
                        if far && !apart {
                            let peer = hex(self.id);
                            tracing::warn!(peer, "the clock of a peer differs from the local one by {difference:.3} s");
                        }
                        apart = far;
                    }
                    Ok(Err(reason)) => tracing::debug!(peer = hex(self.id), "probe failed: {reason}"),
                    Err(_) => tracing::debug!(peer = hex(self.id), "probe failed: no answer"),
                }
            }
        }
    }

    /// The connection for the next time, and by how many seconds the other clock is ahead.
    async fn probe(&self, url: &Url, kept: Option<Connection>) -> Result<(Connection, f64), String> {
        let mut connection = match kept {
            Some(connection) if !connection.is_closed() => connection,
            _ => dial::connect(url, self.shared.post_limits()).await.map_err(|e| dial::chain(&e))?,
        };
        let request = self.shared.request(Method::GET, url, PATH).body(Empty::new()).map_err(|e| e.to_string())?;
        let began = Instant::now();
        let answer = connection.send_request(request).await.map_err(|e| dial::chain(&e))?;
        let round_trip = began.elapsed();
        let received = now();
        if answer.status() != StatusCode::OK {
            return Err(answer.status().to_string());
        }
        let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await.map_err(|e| e.to_string())?;
        let health: Health = serde_json::from_slice(&body.to_bytes()).map_err(|e| e.to_string())?;
        if !health.ok {
            return Err("not OK".to_owned());
        }
        self.numbers.round_trip.record(round_trip);
        let theirs = parse_time(&health.now).ok_or("its time cannot be read")?;
        let ours = received.as_secs_f64() - round_trip.as_secs_f64() / 2.0;
        Ok((connection, theirs - ours))
    }
}

fn now() -> Duration {
    #[allow(clippy::disallowed_methods)] // what clocks show is the question here
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO)
}

/// Seconds since 1970 of a time as in RFC 3339.
fn parse_time(text: &str) -> Option<f64> {
    let (date, rest) = text.split_once(['T', 't'])?;
    let zone_at = rest.find(['Z', 'z', '+', '-'])?;
    let (time, zone) = rest.split_at(zone_at);
    let mut date = date.splitn(3, '-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut time = time.splitn(3, ':');
    let (hour, minute): (i64, i64) = (time.next()?.parse().ok()?, time.next()?.parse().ok()?);
    let second: f64 = time.next()?.parse().ok()?;
    if !(0..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    if !(0..24).contains(&hour) || !(0..60).contains(&minute) || !(0.0..61.0).contains(&second) {
        return None;
    }
    let offset = if zone.eq_ignore_ascii_case("z") {
        0
    } else {
        let (hours, minutes) = zone[1..].split_once(':')?;
        let minutes = hours.parse::<i64>().ok()?.checked_mul(60)?.checked_add(minutes.parse().ok()?)?;
        if zone.starts_with('-') { -minutes } else { minutes }
    };
    // Days since 1970 with years that begin in March, so that the leap day is the last.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days =
        y * 365 + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + (m * 153 + 2) / 5 + day - 1 - 719_468;
    Some((days * 86_400 + hour * 3_600 + (minute - offset) * 60) as f64 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_other_members_read_back() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00Z", 0.0),
            ("2026-11-21T04:38:07.25Z", 1_795_235_887.25),
            ("2026-11-21T06:38:07.25+02:00", 1_795_235_887.25),
            ("2024-02-29T12:00:00-00:30", 1_709_209_800.0),
        ] {
            assert_eq!(parse_time(text), Some(seconds), "{text}");
        }
        let own: Health = serde_json::from_str(&answer()).unwrap();
        assert!((parse_time(&own.now).unwrap() - now().as_secs_f64()).abs() < 1.0);
        for bad in ["", "now", "2026-13-01T00:00:00Z", "2026-11-21T04:38:07", "2026-11-21T04:38:07+é", "-1-1-1T1:1:1Z"]
        {
            assert_eq!(parse_time(bad), None, "{bad}");
        }
    }
}
