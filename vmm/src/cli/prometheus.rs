//! `stats --prometheus`: the figures of the server in the text format that Prometheus reads (version 0.0.4).
//!
//! Seconds and bytes, as is usual there. VMs have no series of their own: clones come and go by the thousand, and each would
//! leave one behind in whatever collects these.

use std::io::{self, Write};
use vmm::api::{RequestLatency, Stats, Totals};
use vmm::units::ByteSize;

/// Whether a figure goes up and down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Gauge,
    Counter,
}

use Kind::{Counter, Gauge};

/// A name, what kind of figure it is, what it means, and its value; none where there is nothing to tell.
type Metric = (&'static str, Kind, &'static str, Option<u64>);

/// What there is to tell; without a server, that there is none.
pub fn write(out: &mut impl Write, stats: Option<&Stats>) -> io::Result<()> {
    metric(out, ("up", Gauge, "Whether there is a server.", Some(u64::from(stats.is_some()))))?;
    let Some(stats) = stats else { return Ok(()) };
    totals(&stats.total).into_iter().try_for_each(|one| metric(out, one))?;
    requests(out, &stats.requests)
}

fn metric(out: &mut impl Write, (name, kind, help, value): Metric) -> io::Result<()> {
    let Some(value) = value else { return Ok(()) };
    let kind = if kind == Counter { "counter" } else { "gauge" };
    head(out, name, kind, help)?;
    writeln!(out, "offshoot_{name} {value}")
}

fn head(out: &mut impl Write, name: &str, kind: &str, help: &str) -> io::Result<()> {
    writeln!(out, "# HELP offshoot_{name} {help}\n# TYPE offshoot_{name} {kind}")
}

fn totals(total: &Totals) -> [Metric; 28] {
    let bytes = |pages| Some(ByteSize::pages(pages).0);
    [
        ("server_pid", Gauge, "Process id of the server.", Some(total.server_pid as u64)),
        ("vms", Gauge, "VMs listed.", Some(total.vms)),
        ("objects", Gauge, "Memory objects.", Some(total.objects)),
        ("stores", Gauge, "Stores of pages.", Some(total.stores)),
        ("resident_bytes", Gauge, "Pages in stores.", bytes(total.resident_pages)),
        ("swapped_bytes", Gauge, "Pages in swap.", bytes(total.swapped_pages)),
        ("unsettled_bytes", Gauge, "Pages still in scratch ranges.", bytes(total.unsettled_pages)),
        ("stage2_tables", Gauge, "Second-stage page tables.", Some(total.stage2_tables)),
        (
            "stage2_tables_unshared_equivalent",
            Gauge,
            "Second-stage page tables there would be if no VM shared any.",
            Some(total.stage2_tables_unshared_equivalent),
        ),
        ("pooled_processes", Gauge, "Prepared VM processes that wait for a fork.", Some(total.pooled)),
        ("host_bytes", Gauge, "Everything the server and its processes use.", Some(total.host_bytes)),
        ("budget_bytes", Gauge, "The memory budget, if there is one.", total.budget_bytes),
        ("accounted_bytes", Gauge, "What counts against the budget.", Some(total.accounted_bytes)),
        ("compressed_bytes", Gauge, "Memory that compressed pages take.", Some(total.compressed_bytes)),
        ("disk_bytes", Gauge, "Taken on the swap disk.", Some(total.disk_bytes)),
        ("swap_slots", Gauge, "Slots of swap in use.", Some(total.swap_slots)),
        ("swap_out_bytes_total", Counter, "Put into swap.", bytes(total.swap_out_pages)),
        ("swap_write_bytes_total", Counter, "Pages written to the swap disk.", bytes(total.swap_write_pages)),
        ("swap_in_bytes_total", Counter, "Pages that came back from swap.", bytes(total.swap_in_pages)),
        (
            "clean_eviction_bytes_total",
            Counter,
            "Pages evicted that swap still had.",
            bytes(total.clean_eviction_pages),
        ),
        ("discarded_bytes_total", Counter, "Pages freed in swap unread.", bytes(total.discarded_pages)),
        ("refault_bytes_total", Counter, "Pages back soon after eviction.", bytes(total.refault_pages)),
        ("lost_bytes_total", Counter, "Pages that could not be read back.", bytes(total.lost_pages)),
        (
            "swap_in_live_bytes_total",
            Counter,
            "Pages from swap straight into a live layer.",
            bytes(total.swap_in_live_pages),
        ),
        ("readahead_bytes_total", Counter, "Pages read before anybody asked.", bytes(total.readahead_pages)),
        ("readahead_hit_bytes_total", Counter, "Of those, pages asked for later.", bytes(total.readahead_hit_pages)),
        ("writeahead_bytes_total", Counter, "Pages written ahead of need.", bytes(total.writeahead_pages)),
        ("traps_total", Counter, "Traps of guests served.", Some(total.traps)),
    ]
}

fn requests(out: &mut impl Write, requests: &[RequestLatency]) -> io::Result<()> {
    if requests.is_empty() {
        return Ok(());
    }
    head(out, "request_failures_total", "counter", "Requests answered by an error.")?;
    for request in requests {
        writeln!(out, "offshoot_request_failures_total{{verb=\"{}\"}} {}", request.kind.word(), request.failures)?;
    }
    let name = "request_duration_seconds";
    head(out, name, "histogram", "From a request to its answer, errors included.")?;
    for request in requests {
        let verb = request.kind.word();
        for bucket in &request.buckets {
            let bound = bucket.up_to_us.map_or("+Inf".into(), seconds);
            writeln!(out, "offshoot_{name}_bucket{{verb=\"{verb}\",le=\"{bound}\"}} {}", bucket.answers)?;
        }
        writeln!(out, "offshoot_{name}_sum{{verb=\"{verb}\"}} {}", seconds(request.total_us))?;
        writeln!(out, "offshoot_{name}_count{{verb=\"{verb}\"}} {}", request.answers)?;
    }
    Ok(())
}

/// Without rounding, and without digits that say nothing.
fn seconds(us: u64) -> String {
    let exact = format!("{}.{:06}", us / 1_000_000, us % 1_000_000);
    exact.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_exact_and_short() {
        assert_eq!([0, 50, 1_000_000, 1_500_001, 60_000_000].map(seconds), ["0", "0.00005", "1", "1.500001", "60"]);
    }

    /// A total that is new is to be told here as well.
    #[test]
    fn no_total_is_left_out() {
        let total = Totals::default();
        let fields = serde_json::to_value(&total).expect("plain data");
        assert_eq!(totals(&total).len(), fields.as_object().expect("an object").len());
    }
}
