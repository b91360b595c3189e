//! Stats of adopted sandboxes: containerd reads the hull's cgroup, we read the pod's.
//!
//! Only what containerd itself reports is replaced, so each version's choice of fields stays (2.1 has no nano cores for
//! sandboxes, 2.3 adds pressure). The network and the containers are the pod's already; so is the number of processes,
//! which containerd counts over the pod's containers, without pause.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::parts::{inner, number, with_inner, without};
use super::{overlay, parts};
use crate::ledger::Adoption;
use crate::wire::{WireError, put_varint};

pub(crate) mod cgroup;

use cgroup::{Memory, Pressure, Reading, Waiting};

/// `PodSandboxStats.attributes` and `.linux`.
const ATTRIBUTES: u32 = 1;
const LINUX: u32 = 2;

/// `LinuxPodSandboxStats`.
const CPU: u32 = 1;
const MEMORY: u32 = 2;
const IO: u32 = 6;

/// Field of every usage that says when it was taken.
const TIMESTAMP: u32 = 1;

/// Most sandboxes of which the last reading is kept; more than a node runs.
const MAX_LAST: usize = 8192;

/// The last CPU reading of each sandbox, from which the rate since then follows.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    last: Mutex<HashMap<String, (u64, i64)>>,
}

impl Rates {
    /// Nano cores since the last reading; 0 at the first.
    fn since_last(&self, id: &str, cpu: u64, at: i64) -> u64 {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = match last.get(id) {
            None => 0,
            Some((_, before)) if at <= *before => return 0,
            Some((used, before)) => {
                let (used, time) = (cpu.saturating_sub(*used), at.abs_diff(*before));
                u64::try_from(u128::from(used) * 1_000_000_000 / u128::from(time)).unwrap_or(u64::MAX)
            }
        };
        if last.len() < MAX_LAST || last.contains_key(id) {
            last.insert(id.to_owned(), (cpu, at));
        }
        rate
    }

    /// The sandbox is gone.
    pub(crate) fn forget(&self, id: &str) {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}

/// Id and labels of a `PodSandboxStats`.
pub(crate) fn whose(item: &[u8]) -> Result<(String, HashMap<String, String>), WireError> {
    let attributes = inner(item, ATTRIBUTES)?.unwrap_or_default();
    Ok((parts::text(&attributes, 1)?, parts::map(&attributes, 3)?))
}

/// `PodSandboxStats` of an adopted sandbox whose cgroup was just read.
pub(crate) fn dressed(
    item: &[u8],
    adoption: &Adoption,
    reading: &Reading,
    rates: &Rates,
) -> Result<Vec<u8>, WireError> {
    let attributes = inner(item, ATTRIBUTES)?.unwrap_or_default();
    let mut out = with_inner(item, ATTRIBUTES, &overlay::attributes(&attributes, adoption)?)?;
    let Some(mut linux) = inner(&out, LINUX)?.map(std::borrow::Cow::into_owned) else {
        return Ok(out);
    };
    if let Some(cpu) = inner(&linux, CPU)? {
        let rate = rates.since_last(&adoption.sandbox_id, reading.cpu, reading.at);
        let values = [(2, reading.cpu), (3, rate)];
        let cpu = usage(&cpu, reading.at, &values, 4, reading.pressure[0])?;
        linux = with_inner(&linux, CPU, &cpu)?;
    }
    if let Some(memory) = inner(&linux, MEMORY)? {
        linux = match reading.memory {
            None => without(&linux, &[MEMORY])?,
            Some(Memory {
                working_set,
                available,
                usage: used,
                rss,
                page_faults,
                major_page_faults,
            }) => {
                let values = [
                    (2, working_set),
                    (3, available),
                    (4, used),
                    (5, rss),
                    (6, page_faults),
                    (7, major_page_faults),
                ];
                let memory = usage(&memory, reading.at, &values, 8, reading.pressure[1])?;
                with_inner(&linux, MEMORY, &memory)?
            }
        };
    }
    if let Some(io) = inner(&linux, IO)? {
        let io = usage(&io, reading.at, &[], 2, reading.pressure[2])?;
        linux = with_inner(&linux, IO, &io)?;
    }
    out = with_inner(&out, LINUX, &linux)?;
    Ok(out)
}

/// A usage with other numbers in those of its fields that are there.
fn usage(
    message: &[u8],
    at: i64,
    values: &[(u32, u64)],
    pressure_field: u32,
    pressure: Option<Pressure>,
) -> Result<Vec<u8>, WireError> {
    let mut out = message.to_vec();
    if number(message, TIMESTAMP)?.is_some() {
        out = without(&out, &[TIMESTAMP])?;
        put_varint(&mut out, TIMESTAMP, at.cast_unsigned());
    }
    for (field, value) in values {
        if inner(&out, *field)?.is_some() {
            let mut boxed = Vec::new();
            put_varint(&mut boxed, 1, *value);
            out = with_inner(&out, *field, &boxed)?;
        }
    }
    if inner(&out, pressure_field)?.is_some() {
        out = match pressure {
            Some(pressure) => with_inner(&out, pressure_field, &pressure_message(pressure))?,
            None => without(&out, &[pressure_field])?,
        };
    }
    Ok(out)
}

fn pressure_message(pressure: Pressure) -> Vec<u8> {
    use hullspeed_proto::cri::v1::{PsiData, PsiStats};
    let data = |waiting: Waiting| PsiData {
        total: waiting.total_nanoseconds,
        avg10: waiting.averages[0],
        avg60: waiting.averages[1],
        avg300: waiting.averages[2],
    };
    let stats = PsiStats {
        full: pressure.full.map(data),
        some: pressure.some.map(data),
    };
    prost::Message::encode_to_vec(&stats)
}
