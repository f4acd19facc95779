package oracle

// checkLiveness flags an election without a leader in calm. Soon after the calm begins there must be a leader. Later
// vacancies must be short.
func (c *checker) checkLiveness() {
	led := make(map[string][]span)
	for _, t := range c.terms {
		if t.won != nil {
			led[t.election] = append(led[t.election], span{t.won.T, t.last})
		}
	}
	for _, election := range c.Elections {
		led := merge(led[election])
		for _, e := range c.calms {
			settled := e.From + int64(c.TTL+RecoverTime)
			for _, s := range gaps(span{e.From, e.T}, led) {
				if s.to > max(settled, s.from+int64(RecoverTime))+int64(c.Patience) {
					c.violate(RuleLiveness, []*Entry{e}, "%s had no leader from %s to %s, although it had been calm since %s",
						election, c.at(s.from), c.at(s.to), c.at(e.From))
				}
			}
		}
	}
}

// gaps returns the parts of whole that the merged spans do not cover. Some of them are empty.
func gaps(whole span, spans []span) []span {
	var left []span
	for {
		s, ok := touches(spans, whole)
		if !ok {
			return append(left, whole)
		}
		left = append(left, span{whole.from, s.from})
		whole.from = s.to + 1
	}
}
