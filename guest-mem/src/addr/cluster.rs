//! Clusters: aligned groups of pages that go to swap, and come back, together.

use super::{PageCount, PageNumber, RangeOf};

/// Pages kept together: 64 KiB.
pub const CLUSTER: PageCount = PageCount(16);

/// The cluster that a page is in.
pub(crate) fn cluster_of<I: PageNumber>(page: I) -> RangeOf<I> {
    pages_of(page.raw() / CLUSTER.0)
}

/// The clusters that have a page among these.
pub(crate) fn clusters<I: PageNumber>(pages: RangeOf<I>) -> std::ops::Range<u64> {
    pages.start().raw() / CLUSTER.0..pages.end().raw().div_ceil(CLUSTER.0)
}

/// Its pages.
pub(crate) fn pages_of<I: PageNumber>(cluster: u64) -> RangeOf<I> {
    RangeOf::new(I::from_raw(cluster * CLUSTER.0), CLUSTER)
}

/// Cuts pages at the borders of clusters.
pub(crate) fn by_clusters<I: PageNumber>(pages: RangeOf<I>) -> impl Iterator<Item = RangeOf<I>> {
    clusters(pages).map(move |cluster| pages_of(cluster).intersect(pages))
}
