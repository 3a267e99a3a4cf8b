//! Clusters: aligned groups of pages that go to swap, and come back, together.

use super::{Gfn, GfnRange, PageCount};

/// Pages kept together: 64 KiB.
pub const CLUSTER: PageCount = PageCount(16);

/// The cluster that a page of an object is in.
pub(crate) fn cluster_of(page: Gfn) -> GfnRange {
    GfnRange::new(Gfn(page.0 / CLUSTER.0 * CLUSTER.0), CLUSTER)
}

/// The clusters that have a page among these.
pub(crate) fn clusters(pages: GfnRange) -> std::ops::Range<u64> {
    pages.start().0 / CLUSTER.0..pages.end().0.div_ceil(CLUSTER.0)
}

/// Its pages.
pub(crate) fn frames(cluster: u64) -> GfnRange {
    GfnRange::new(Gfn(cluster * CLUSTER.0), CLUSTER)
}

/// Cuts pages at the borders of clusters.
pub(crate) fn by_clusters(pages: GfnRange) -> impl Iterator<Item = GfnRange> {
    let first = cluster_of(pages.start()).start().0;
    (first..pages.end().0).step_by(CLUSTER.0 as usize).map(move |at| GfnRange::new(Gfn(at), CLUSTER).intersect(pages))
}
