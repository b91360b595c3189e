//! A daemon's `/metrics`.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;

const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// Where a daemon of ours answers with its metrics.
#[derive(Debug, Clone, Copy)]
pub struct Metrics {
    address: SocketAddr,
}

impl Metrics {
    /// A free address for a daemon that is about to be configured.
    pub fn reserve() -> Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, crate::registry::free_port()?));
        Ok(Self { address })
    }

    /// The address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The whole text.
    pub async fn text(&self) -> Result<String> {
        let body = crate::probe::first_200(self.address, "/metrics", ANSWER_LIMIT).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// Sum of a metric's samples whose line contains all of `labels`; 0 when there is none.
    pub async fn sum(&self, name: &str, labels: &[&str]) -> Result<f64> {
        let text = self.text().await?;
        let lines = text
            .lines()
            .filter(|line| !line.starts_with('#') && line.split(['{', ' ']).next() == Some(name));
        let chosen = lines.filter(|line| labels.iter().all(|label| line.contains(label)));
        Ok(chosen
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum())
    }
}
