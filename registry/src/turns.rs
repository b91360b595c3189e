//! One host after the other: a request for what any of an image's hosts may have.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::client::Client;
use crate::endpoint::Endpoint;
use crate::error::{Error, ErrorClass, Fault};
use crate::hosts::Capabilities;
use crate::limits::{HOST_AVOIDED, HOST_AVOIDED_MOST, MAX_REGISTRIES};
use crate::reference::Reference;
use crate::retry::jittered;

/// What a host must be trusted with to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Content by its digest, which is checked.
    Pull,
    /// What a tag means.
    Resolve,
}

impl Need {
    fn is_met(self, able: Capabilities) -> bool {
        able.pull && (self == Self::Pull || able.resolve)
    }
}

/// Hosts that failed lately, and until when they are asked after the others.
#[derive(Debug, Default)]
pub(crate) struct Avoided(Mutex<HashMap<String, Failures>>);

#[derive(Debug)]
struct Failures {
    count: u32,
    until: Instant,
}

impl Avoided {
    fn is_avoided(&self, endpoint: &Endpoint) -> bool {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table
            .get(endpoint.key())
            .is_some_and(|failures| failures.until > Instant::now())
    }

    fn note_failure(&self, endpoint: &Endpoint) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if table.len() >= MAX_REGISTRIES {
            table.retain(|_, failures| failures.until > now);
        }
        let failures = table
            .entry(endpoint.key().to_owned())
            .or_insert(Failures { count: 0, until: now });
        failures.until = now + back_off(failures.count);
        failures.count = failures.count.saturating_add(1);
    }

    fn note_success(&self, endpoint: &Endpoint) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.remove(endpoint.key());
    }
}

fn back_off(failures: u32) -> Duration {
    let doubled = HOST_AVOIDED.saturating_mul(1_u32.checked_shl(failures).unwrap_or(u32::MAX));
    jittered(doubled.min(HOST_AVOIDED_MOST))
}

/// The hosts for one request.
pub(crate) struct Turns<'a> {
    client: &'a Client,
    /// Those that failed lately are last; never empty.
    hosts: Vec<Arc<Endpoint>>,
    at: usize,
    /// The host that the file has last, which knows best what there is.
    last: Arc<Endpoint>,
    /// What that one said.
    telling: Option<Error>,
}

impl Client {
    /// The hosts that may be asked for something of `image`.
    pub(crate) fn turns(&self, image: &Reference, need: Need, asked: &str) -> Result<Turns<'_>, Error> {
        let endpoints = self.endpoints(image)?;
        let able = endpoints.iter().filter(|endpoint| need.is_met(endpoint.capabilities));
        let mut hosts: Vec<Arc<Endpoint>> = able.cloned().collect();
        let Some(last) = hosts.last().cloned() else {
            return Err(Fault::NoHost("no host of hosts.toml may do this").at(image.host(), asked));
        };
        if hosts.len() > 1 {
            hosts.sort_by_cached_key(|endpoint| self.avoided().is_avoided(endpoint));
        }
        Ok(Turns {
            client: self,
            hosts,
            at: 0,
            last,
            telling: None,
        })
    }
}

impl Turns<'_> {
    /// Whose turn it is.
    pub(crate) fn host(&self) -> &Endpoint {
        &self.hosts[self.at]
    }

    /// How often it is asked: only the host that is last in the file is worth waiting for.
    pub(crate) fn attempts(&self) -> u32 {
        if std::ptr::eq(self.host(), Arc::as_ptr(&self.last)) {
            self.client.retry().attempts
        } else {
            1
        }
    }

    /// The host has answered.
    pub(crate) fn succeeded(&self) {
        if self.hosts.len() > 1 {
            self.client.avoided().note_success(self.host());
        }
    }

    /// The host has failed: the turn is the next one's, or, if there is none, all have failed.
    pub(crate) fn failed(&mut self, error: Error) -> Result<(), Error> {
        let host = self.host();
        if error.class() == ErrorClass::Transient && self.hosts.len() > 1 {
            self.client.avoided().note_failure(host);
        }
        let is_last = std::ptr::eq(host, Arc::as_ptr(&self.last));
        if self.at + 1 < self.hosts.len() {
            tracing::info!(
                host = host.name,
                error = &error as &dyn std::error::Error,
                "a host of the registry failed; the next one is asked"
            );
            if is_last {
                self.telling = Some(error);
            }
            self.at += 1;
            return Ok(());
        }
        Err(self.telling.take().unwrap_or(error))
    }
}
