// How numbers and times are written, and the same moving average as in the report.
"use strict";

const Numbers = {
  // Five significant digits.
  short(value) {
    if (value === null || value === undefined) return "";
    return Number(value.toPrecision(5)).toString();
  },

  // "3 min ago"; `seconds` since the epoch.
  ago(seconds) {
    const passed = Math.max(0, Date.now() / 1000 - seconds);
    if (passed < 60) return `${Math.round(passed)} s ago`;
    if (passed < 3600) return `${Math.round(passed / 60)} min ago`;
    if (passed < 48 * 3600) return `${Math.round(passed / 3600)} h ago`;
    return `${Math.round(passed / 86400)} days ago`;
  },

  // A centred moving average over a fortieth of the points, and over fewer towards the ends; null counts for nothing.
  smoothed(values, inLogs) {
    const sums = [0], counts = [0];
    values.forEach((value, place) => {
      const known = value !== null && (!inLogs || value > 0);
      sums.push(sums[place] + (known ? (inLogs ? Math.log(value) : value) : 0));
      counts.push(counts[place] + (known ? 1 : 0));
    });
    const widest = Math.max(2, Math.floor(values.length / 80));
    return values.map((_, place) => {
      const reach = Math.min(widest, place, values.length - 1 - place);
      const count = counts[place + reach + 1] - counts[place - reach];
      if (count === 0) return null;
      const mean = (sums[place + reach + 1] - sums[place - reach]) / count;
      return inLogs ? Math.exp(mean) : mean;
    });
  },
};
